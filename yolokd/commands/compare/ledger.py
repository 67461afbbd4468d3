"""The ledger of a comparison: a CSV with one row for each finished run, which is never run again."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from yolokd.errors import UserError, first_problem
from yolokd.runtime.files import write_csv

VERSIONS = ("yolokd", "ultralytics", "torch")  # columns with the versions that made a row
TEACHER = "teacher"  # the `method` of the row that holds the teacher's own score


def _check_curve(curve: str) -> str:
    """Return the text of a curve. Raises ValueError unless it holds scores with spaces between them."""
    for value in curve.split():
        if not 0 <= float(value) <= 1:
            raise ValueError(f"{value} is no score in 0..1")
    return curve


Score = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]
Curve = Annotated[str, AfterValidator(_check_curve)]


class LedgerRow(BaseModel):
    """A finished run: its identity, its scores in 0..1, and its cost.

    hash: of the whole identity. config: hash of all that shapes the training, except the seed. ground: hash of what
    rows must have in common to be compared. teacher_row: the hash of the row with the teacher's own score; empty if
    there is none. teacher, student, data: names of files, for people. ap_small, ap_medium, ap_large: None if the split
    has no box of that size. images_per_second: of training, over the time of the whole run, validation included.
    curve: mAP50-95 on the validation set, epoch by epoch. metric: what the mAP compares, which decides. box_map,
    box_map50: of upright boxes, if these do not decide.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
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
    map: Score
    map50: Score
    ap_small: Score | None
    ap_medium: Score | None
    ap_large: Score | None
    seconds: Amount
    images_per_second: Amount
    yolokd: str
    ultralytics: str
    torch: str
    curve: Curve
    d_pred: Amount | None = None
    d_pred_teacher: str = ""
    metric: Literal["box", "mask", "pose", "rotated box"] = "box"
    box_map: Score | None = None
    box_map50: Score | None = None

    @property
    def epochs(self) -> list[float]:
        """Return mAP50-95 epoch by epoch."""
        return [float(v) for v in self.curve.split()]


COLUMNS = list(LedgerRow.model_fields)
OLD_COLUMNS = [name for name, field in LedgerRow.model_fields.items() if field.is_required()]  # of earlier releases
OLD_COLUMNS_WITH_D_PRED = [*OLD_COLUMNS, "d_pred", "d_pred_teacher"]  # of later ones


def read(path: Path) -> dict[str, LedgerRow]:
    """Return the rows of a ledger by their hashes; no rows if there is no file, or if it is empty.

    Raises UserError if the file is no ledger.
    """
    if not path.exists() or path.stat().st_size == 0:
        return {}
    cure = "give one that `yolokd compare` wrote"
    rows: dict[str, LedgerRow] = {}
    try:
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            for line in reader:
                if None in line:
                    problem = f"is no comparison's CSV: line {reader.line_num} has more cells than there are columns"
                    raise UserError(f"csv={path}", problem, cure)
                row = LedgerRow.model_validate(_empty_numbers_as_none(line))
                rows[row.hash] = row
            if reader.fieldnames not in (COLUMNS, OLD_COLUMNS, OLD_COLUMNS_WITH_D_PRED):
                raise KeyError(reader.fieldnames)
    except ValidationError as e:
        (column, *_), problem = first_problem(e)
        why = f"is no comparison's CSV: line {reader.line_num}, column {column}: {problem}"
        raise UserError(f"csv={path}", why, cure) from e
    except (TypeError, KeyError, UnicodeDecodeError, OSError, csv.Error) as e:
        raise UserError(f"csv={path}", "is no comparison's CSV", cure) from e
    return rows


def _empty_numbers_as_none(line: dict[str, Any]) -> dict[str, Any]:
    numbers = ("ap_", "box_map")
    return {k: None if v == "" and (k.startswith(numbers) or k == "d_pred") else v for k, v in line.items()}


def append(path: Path, row: LedgerRow) -> None:
    """Add a row to a ledger, unless it is there.

    A lock keeps the rows of several comparisons that share the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        rows = read(path)
        if row.hash not in rows:
            write([*rows.values(), row], path)


def write(rows: Iterable[LedgerRow], path: Path) -> None:
    """Write rows as a ledger, replacing the file in one step."""
    write_csv(path, COLUMNS, (row.model_dump() for row in rows))
