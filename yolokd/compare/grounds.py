"""Grounds: which rows of a ledger may be compared with which, and by what names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ultralytics.utils import DEFAULT_CFG_DICT

from yolokd.compare.ledger import TEACHER, VERSIONS, Row
from yolokd.config import is_own
from yolokd.contenders import concerns


def ground_of(row: Row) -> str:
    """What the rows of a comparison have in common: student, data, split, and Ultralytics' settings."""
    theirs = [word for word in row.settings.split() if not is_own(word.partition("=")[0])]
    return " ".join([f"{row.student} on {row.data}, scored on {row.split}:", *theirs])


def by_ground(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of students on each ground, in order of first appearance."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.method != TEACHER:
            found.setdefault(ground_of(row), []).append(row)
    return found


def teacher_of(rows: Sequence[Row], shown: Sequence[Row]) -> Row | None:
    """The row of the (strongest) teacher of a ground's rows, scored on the same pictures; None unless it is one."""
    names = {row.teacher for row in rows if row.teacher}
    found = [
        t
        for t in shown
        if t.method == TEACHER
        and (t.data, t.split, _size(t)) == (rows[0].data, rows[0].split, _size(rows[0]))
        and (not names or any(f" {name}".endswith(f" {t.teacher}") for name in names))
    ]
    return found[-1] if len({t.teacher for t in found}) == 1 else None


def _size(row: Row) -> str:
    unsaid = f"imgsz={DEFAULT_CFG_DICT['imgsz']}"
    return next((word for word in row.settings.split() if word.startswith("imgsz=")), unsaid)


def mixed_versions(rows: Sequence[Row]) -> str:
    """What of yolokd, Ultralytics and torch differs between rows, in words; empty where nothing does."""
    found = {name: sorted({str(getattr(row, name)) for row in rows}) for name in VERSIONS}
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items() if len(values) > 1)


def labelled(rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """The settings that rows share, wherever they apply, and the rows with those of their own in the method's name."""
    settings = [[*row.settings.split(), *_teacher(row)] for row in rows]
    words = list(dict.fromkeys(word for line in settings for word in line))
    shared = [
        word
        for word in words
        if all(
            word in line or not _concerns(word.partition("=")[0], row) for row, line in zip(rows, settings, strict=True)
        )
    ]
    names = [
        " ".join([row.method, *(w for w in line if w not in shared)]) for row, line in zip(rows, settings, strict=True)
    ]
    renamed = [row.model_copy(update={"method": name}) for row, name in zip(rows, names, strict=True)]
    return " ".join(shared), renamed


def _concerns(key: str, row: Row) -> bool:
    return bool(row.teacher) if key == "teacher" else concerns(key, row.method)


def _teacher(row: Row) -> list[str]:
    return [f"teacher={row.teacher.replace(' ', ',')}"] if row.teacher else []
