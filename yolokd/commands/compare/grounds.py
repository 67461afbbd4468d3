"""Grounds: which rows of a ledger may be compared with which, and by what names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from yolokd.commands.candidates import setting_applies
from yolokd.commands.compare.ledger import TEACHER, VERSIONS, LedgerRow


def by_ground(rows: Iterable[LedgerRow]) -> dict[str, list[LedgerRow]]:
    """The rows of students on each ground (student, data, split, Ultralytics' settings), in order of appearance."""
    found: dict[str, list[LedgerRow]] = {}
    for row in rows:
        if row.method != TEACHER:
            found.setdefault(row.ground, []).append(row)
    return found


def teachers_of(rows: Iterable[LedgerRow], held: Iterable[LedgerRow]) -> list[LedgerRow]:
    """The rows among those held with the scores of these rows' teachers."""
    known = {row.teacher_row for row in rows}
    return [row for row in held if row.method == TEACHER and row.hash in known]


def mixed_versions(rows: Sequence[LedgerRow]) -> str:
    """What of yolokd, Ultralytics and torch differs between rows, in words; empty where nothing does."""
    found = {name: sorted({str(getattr(row, name)) for row in rows}) for name in VERSIONS}
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items() if len(values) > 1)


def labelled(rows: Sequence[LedgerRow]) -> tuple[str, list[LedgerRow]]:
    """The settings that rows share, wherever they apply, and the rows with those of their own in the method's name.

    A configuration may have been told in several words (a file moved, a default given): its first ones are its name.
    Where words do not tell configurations apart (files of one name, another release's defaults), their hashes do.
    """
    words = {row.config: [*row.settings.split(), *_teacher(row)] for row in reversed(rows)}
    settings = [words[row.config] for row in rows]
    shared = [
        word
        for word in dict.fromkeys(word for line in settings for word in line)
        if all(
            word in line or not _setting_applies_to_row(word.partition("=")[0], row)
            for row, line in zip(rows, settings, strict=True)
        )
    ]
    names = [
        " ".join([row.method, *(w for w in line if w not in shared)]) for row, line in zip(rows, settings, strict=True)
    ]
    configs = {(name, row.config) for name, row in zip(names, rows, strict=True)}
    meant = Counter(name for name, _ in configs)
    full = [f"{name} ({row.config[:6]})" if meant[name] > 1 else name for name, row in zip(names, rows, strict=True)]
    common = " ".join(_brief(shared, {word for line in settings for word in line}))
    return common, [row.model_copy(update={"method": name}) for row, name in zip(rows, full, strict=True)]


def _brief(shared: Sequence[str], told: Iterable[str]) -> Iterable[str]:
    """What rows share, with their methods' schedules as one word where all are the same: there may be a dozen."""
    if len({word.partition(".schedule=")[2] for word in told if ".schedule=" in word}) != 1:
        return shared
    return dict.fromkeys(word[word.index("schedule=") :] if ".schedule=" in word else word for word in shared)


def _setting_applies_to_row(key: str, row: LedgerRow) -> bool:
    return bool(row.teacher) if key == "teacher" else setting_applies(key, row.method)


def _teacher(row: LedgerRow) -> list[str]:
    return [f"teacher={row.teacher.replace(' ', ',')}"] if row.teacher else []
