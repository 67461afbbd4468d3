"""deploy.csv: one row for each format that was measured, so that nothing is measured twice."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from yolokd.errors import UserError, first_problem
from yolokd.runtime.files import write_csv

STUDENT, TEACHER, BASELINE = "student", "teacher", "baseline"  # of the column `model`
CHECKPOINT = "checkpoint"  # of the column `format`
NOT_SCORED = "was not scored"  # how a `problem` begins if a file runs, but has no score
Score = Annotated[float, Field(ge=0, le=1)]
Amount = Annotated[float, Field(ge=0)]


SCORES = TypeAdapter(dict[str, Score])


def _check_scores(text: str) -> str:
    """Return a JSON object of scores by class, or nothing. Raises ValueError for anything else."""
    return SCORES.dump_json(SCORES.validate_json(text)).decode() if text else ""


class DeployRow(BaseModel):
    """A model in one format: what it is, and what was measured.

    sha256: of the checkpoint. validation: hash of the images and labels of the split. map, map50: scores in 0..1.
    difference: of mAP50-95 to the student's checkpoint. ap_by_class: AP50-95 of each class, as JSON. worst_class: the
    one of the lowest; most_lost_class: the one that lost most against the student's checkpoint. p50_ms, p95_ms: latency
    of one image. peak_mib: memory of a process that runs nothing else. parity: whether outputs and detections agree
    with the checkpoint's. problem: why something was not measured. processor: its name; empty in older files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model: str
    format: str
    file: str
    megabytes: Amount | None = None
    map: Score | None = None
    difference: float | None = None
    worst_class: str = ""
    worst_ap: Score | None = None
    most_lost_class: str = ""
    most_lost: float | None = None
    p50_ms: Amount | None = None
    p95_ms: Amount | None = None
    peak_mib: Amount | None = None
    parity: str = ""
    problem: str = ""
    data: str
    split: str
    images: int | None = None
    imgsz: int
    threads: int
    processor: str = ""
    runs: int | None = None
    runtime: str = ""
    map50: Score | None = None
    ap_by_class: Annotated[str, AfterValidator(_check_scores)] = ""
    yolokd: str
    ultralytics: str
    torch: str
    sha256: str
    validation: str

    @property
    def name(self) -> str:
        """Return what tables call it: `onnx-int8`, `checkpoint`, `teacher t.pt`."""
        return self.format if self.model == STUDENT else f"{self.model} {self.file}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Return the key that is unique among a file's rows."""
        return self.model, self.format, "" if self.model == STUDENT else self.sha256

    @property
    def scores(self) -> dict[str, float]:
        """Return AP50-95 of each class."""
        return dict(json.loads(self.ap_by_class or "{}"))

    def compared(self, reference: DeployRow) -> DeployRow:
        """Return the row with its differences to the row of the student's checkpoint, if both were scored."""
        if self.map is None or reference.map is None:
            return self
        losses = {name: score - reference.scores[name] for name, score in self.scores.items()}
        most = min(losses, key=losses.__getitem__)
        lost = {"most_lost_class": most, "most_lost": losses[most]} if losses[most] < 0 else {}
        return self.model_copy(update={"difference": self.map - reference.map, **lost})


Rows = dict[tuple[str, str, str], DeployRow]
COLUMNS = list(DeployRow.model_fields)
OPTIONAL = [name for name, field in DeployRow.model_fields.items() if field.default is None]
# What all rows of a file share, in a user's words.
SHARED = {
    "data": "data set", "split": "split", "validation": "validation images or labels", "imgsz": "image size",
    "threads": "number of threads", "processor": "processor",
}  # fmt: skip


def read(path: Path) -> Rows:
    """Return the rows of a file by their keys; none if it does not exist. Raises UserError if it is no such file."""
    if not path.exists():
        return {}
    cure = "move it away, or give another save_dir="
    try:
        with open(path, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            rows = [DeployRow.model_validate(_empty_as_none(line)) for line in reader]
    except ValidationError as e:
        (column, *_), problem = first_problem(e)
        why = f"was not written by `yolokd deploy`: line {reader.line_num}, column {column}: {problem}"
        raise UserError(str(path), why, cure) from e
    except (TypeError, UnicodeDecodeError, OSError, csv.Error) as e:
        raise UserError(str(path), "was not written by `yolokd deploy`", cure) from e
    return {row.key: row for row in rows}


def _empty_as_none(line: dict[str, Any]) -> dict[str, Any]:
    return {k: None if v == "" and k in OPTIONAL else v for k, v in line.items()}


def check_same(rows: Rows, new: DeployRow, path: Path) -> None:
    """Raise UserError if the rows of a file cannot stand beside a new one: another checkpoint, data set, image size."""
    cure = "move it away, or give another save_dir="
    for row in rows.values():
        for column, meaning in SHARED.items():
            old, now = getattr(row, column), getattr(new, column)
            if old not in ("", now):
                values = "" if column == "validation" else f", {old}, not {now}"
                raise UserError(str(path), f"holds rows of another {meaning}{values}", cure)
        if row.model == STUDENT and row.sha256 != new.sha256:
            raise UserError(str(path), "holds rows of another checkpoint", cure)


def other_versions(rows: Iterable[DeployRow], current: Mapping[str, str]) -> str:
    """Return which versions of libraries measured rows and are not the current ones, as text; empty if none."""
    found = {(name, getattr(row, name)) for row in rows for name in current}
    return ", ".join(f"{name} {version}" for name, version in sorted(found - {*current.items()}))


def write(rows: Iterable[DeployRow], path: Path) -> None:
    """Write rows, replacing the file in one step. Raises UserError if that fails."""
    lines = ({k: round(v, 5) if isinstance(v, float) else v for k, v in row.model_dump().items()} for row in rows)
    write_csv(path, COLUMNS, lines)
