"""Grounds: the groups of a ledger's rows that may be compared, and the names that tell their rows apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from yolokd.commands.candidates import setting_applies
from yolokd.commands.compare.ledger import TEACHER, VERSIONS, LedgerRow


def by_ground(rows: Iterable[LedgerRow]) -> dict[str, list[LedgerRow]]:
    """Group students' rows by their ground (student, data, split, Ultralytics' settings), in order of appearance."""
    grounds: dict[str, list[LedgerRow]] = {}
    for row in rows:
        if row.method != TEACHER:
            grounds.setdefault(row.ground, []).append(row)
    return grounds


def teachers_of(rows: Iterable[LedgerRow], ledger: Iterable[LedgerRow]) -> list[LedgerRow]:
    """Return the rows of a ledger that hold the scores of these rows' teachers."""
    hashes = {row.teacher_row for row in rows}
    return [row for row in ledger if row.method == TEACHER and row.hash in hashes]


def comparable_disagreements(rows: Sequence[LedgerRow]) -> list[LedgerRow]:
    """Return the rows; remove plain training's D_pred if D_pred was measured with different teachers.

    A run with a teacher is compared with its own. Plain training has none: its D_pred is against the teacher of the
    comparison that ran it, and says nothing beside that of another.
    """
    if len({row.d_pred_teacher for row in rows if row.d_pred is not None}) < 2:
        return list(rows)
    return [row if row.teacher else row.model_copy(update={"d_pred": None}) for row in rows]


def mixed_versions(rows: Sequence[LedgerRow]) -> str:
    """Return which versions of yolokd, Ultralytics and torch differ between rows, as text; empty if none differs."""
    versions = {name: sorted({str(getattr(row, name)) for row in rows}) for name in VERSIONS}
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in versions.items() if len(values) > 1)


def name_configurations(rows: Sequence[LedgerRow]) -> tuple[str, list[LedgerRow]]:
    """Return the settings that all rows share, as text, and the rows with their other settings added to `method`.

    A setting is common if every row to which it applies has it. Rows of one configuration may name it differently (a
    file was moved, a default was given): its first row's settings name it. If two configurations would have the same
    name (files of one name, another release's defaults), their hashes are added.
    """
    settings_of = {row.config: [*row.settings.split(), *_teacher_setting(row)] for row in reversed(rows)}
    settings = [settings_of[row.config] for row in rows]
    distinct = dict.fromkeys(setting for row_settings in settings for setting in row_settings)
    common = [setting for setting in distinct if _is_common(setting, rows, settings)]
    names = [
        " ".join([row.method, *(setting for setting in row_settings if setting not in common)])
        for row, row_settings in zip(rows, settings, strict=True)
    ]
    configs = {(name, row.config) for name, row in zip(names, rows, strict=True)}
    configs_of_name = Counter(name for name, _ in configs)
    unique_names = [
        f"{name} ({row.config[:6]})" if configs_of_name[name] > 1 else name
        for name, row in zip(names, rows, strict=True)
    ]
    named = [row.model_copy(update={"method": name}) for row, name in zip(rows, unique_names, strict=True)]
    return " ".join(_merge_schedules(common, distinct)), named


def _is_common(setting: str, rows: Sequence[LedgerRow], settings: Sequence[Sequence[str]]) -> bool:
    """Return whether every row to which the key of a setting (`key=value`) applies has this setting."""
    key = setting.partition("=")[0]
    return all(
        setting in row_settings or not _setting_applies_to_row(key, row)
        for row, row_settings in zip(rows, settings, strict=True)
    )


def _merge_schedules(common: Sequence[str], settings: Iterable[str]) -> Iterable[str]:
    """Return common settings; `NAME.schedule=…` of all methods become one `schedule=…` if all settings agree on it."""
    if len({setting.partition(".schedule=")[2] for setting in settings if ".schedule=" in setting}) != 1:
        return common
    return dict.fromkeys(
        setting[setting.index("schedule=") :] if ".schedule=" in setting else setting for setting in common
    )


def _setting_applies_to_row(key: str, row: LedgerRow) -> bool:
    return bool(row.teacher) if key == "teacher" else setting_applies(key, row.method)


def _teacher_setting(row: LedgerRow) -> list[str]:
    return [f"teacher={row.teacher.replace(' ', ',')}"] if row.teacher else []
