"""The ledger of a comparison: one CSV row for each finished run, which is never run again."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from yolokd.errors import UserError
from yolokd.runtime.files import atomic_path

VERSIONS = ("yolokd", "ultralytics", "torch")  # columns with the versions that made a row
TEACHER = "teacher"  # the `method` of the row that holds the teacher's own score


class LedgerRow(BaseModel):
    """A finished run: what it was, its scores in 0..1, and what it took.

    hash: of all of it. config: of what shapes the training, but for the seed. ground: of what rows have in common that
    may be compared. teacher_row: the hash of the row with the teacher's own score; empty where there is none. Names of
    files are for people. An AP is None where the split has no box of that size. images_per_second: of training, by the
    time of the whole run, validation included. curve: mAP50-95 on the validation set, epoch by epoch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    hash: str
    config: str
    ground: str
    teacher_row: str
    method: str
    seed: int
    split: str
    teacher: str
    student: str
    data: str
    settings: str
    map: float
    map50: float
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    seconds: float
    images_per_second: float
    yolokd: str
    ultralytics: str
    torch: str
    curve: str

    @property
    def epochs(self) -> list[float]:
        """mAP50-95 epoch by epoch."""
        return [float(v) for v in self.curve.split()]


COLUMNS = list(LedgerRow.model_fields)


def read(path: Path) -> dict[str, LedgerRow]:
    """The rows by hash; none where there is no file, or nothing in it yet.

    Raises UserError where the file is no ledger.
    """
    if not path.exists() or path.stat().st_size == 0:
        return {}
    try:
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            rows = [LedgerRow.model_validate(_typed(line)) for line in reader]
            if reader.fieldnames != COLUMNS:
                raise KeyError(reader.fieldnames)
    except (ValidationError, TypeError, KeyError, UnicodeDecodeError, OSError, csv.Error) as e:
        raise UserError(f"csv={path}", "is no comparison's CSV", "give one that `yolokd compare` wrote") from e
    return {row.hash: row for row in rows}


def _typed(line: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v == "" and k.startswith("ap_") else v for k, v in line.items()}


def append(path: Path, row: LedgerRow) -> None:
    """Add a row, unless it is there; comparisons which share the file keep each other's rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read(path)
        if row.hash not in rows:
            write([*rows.values(), row], path)


def write(rows: Iterable[LedgerRow], path: Path) -> None:
    """Make a ledger of rows, whole or not at all."""
    with atomic_path(path) as whole, open(whole, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in rows)
