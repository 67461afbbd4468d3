"""The table of families of detectors that can be paired, as cfg/README.md shows it."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from helpers.pairs import METHOD_KINDS

Refused = Mapping[str, str]  # {kind of method: why it is refused}; the other kinds work
Pairs = Mapping[tuple[str, str], Refused]  # by the families of teacher and student


def write_pairs(path: Path, pairs: Pairs) -> None:
    """Write one row for each teacher, student and kind of method."""
    with open(path, "w", encoding="utf-8", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(("teacher", "student", "compares", "method", "refused"))
        for (teacher, student), refused in pairs.items():
            writer.writerows(
                (teacher, student, kind, METHOD_KINDS[kind], refused.get(kind, "")) for kind in METHOD_KINDS
            )


def read_pairs(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """Read what `write_pairs` wrote."""
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    with open(path, encoding="utf-8", newline="") as f:
        for row in csv.DictReader(f):
            refused = pairs.setdefault((row["teacher"], row["student"]), {})
            if row["refused"]:
                refused[row["compares"]] = row["refused"]
    return pairs


def markdown(pairs: Pairs) -> str:
    """Return the table: families that behave alike share a row or a column, and reasons are listed below."""
    teachers, students = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    columns = _alike({teacher: [pairs[teacher, student] for student in students] for teacher in teachers})
    rows = _alike({student: [pairs[teacher, student] for teacher in teachers] for student in students})
    reasons: list[str] = []
    lines = [
        "| student \\ teacher | " + " | ".join(map(_names, columns)) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for row in rows:
        cells = (_cell(pairs[column[0], row[0]], reasons) for column in columns)
        lines.append(f"| {_names(row)} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)), ""])


def _alike(outcomes: Mapping[str, Sequence[Refused]]) -> list[list[str]]:
    """Return groups of families of the same outcomes."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for family, outcome in outcomes.items():
        groups[str(outcome)].append(family)
    return list(groups.values())


def _names(families: Sequence[str]) -> str:
    return ", ".join(families)


def _cell(refused: Refused, reasons: list[str]) -> str:
    """Return what works, and the numbers of the reasons why the rest does not; new reasons are added to the list."""
    if not refused:
        return "all methods"
    numbers = []
    for kind, problem in refused.items():
        reason = problem.replace(f"which {METHOD_KINDS[kind]} needs", "which such methods need")
        if reason not in reasons:
            reasons.append(reason)
        numbers.append(reasons.index(reason) + 1)
    because = ", ".join(f"({number})" for number in dict.fromkeys(numbers))
    if len(refused) == len(METHOD_KINDS):
        return f"refused {because}"
    works = [kind for kind in METHOD_KINDS if kind not in refused]
    return f"{_names(works)} {because}" if len(works) < len(refused) else f"all but {_names(list(refused))} {because}"
