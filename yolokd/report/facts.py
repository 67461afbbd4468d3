"""What a report says of a run in words and tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ultralytics.utils import DEFAULT_CFG_DICT

from yolokd.config.defaults import defaults, method_defaults
from yolokd.config.schedule import Schedule
from yolokd.data.dataset import data_name
from yolokd.models.origin import origin_of
from yolokd.models.size import ModelSize, model_size
from yolokd.models.tasks import Task
from yolokd.models.teachers.backbone import is_backbone, teacher_name
from yolokd.pyramid.level import level_name
from yolokd.pyramid.pairing import Pairing
from yolokd.report.history import History
from yolokd.report.kept import Record
from yolokd.report.run import Run
from yolokd.runtime.files import sha256

DEPLOY = "deploy.csv"
FOR_PROGRAMS = ("ap_by_class", "sha256", "validation")  # columns of deploy.csv that are made for programs
MAX_ROWS = 200  # ours: of a table of deploy.csv that is shown


@dataclass(frozen=True)
class Table:
    """A table: its title, headers, and rows of texts."""

    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]


SCORE50 = {  # what mAP50 counts, by task
    "detect": "boxes with an IoU of at least 0.5",
    "segment": "masks with an IoU of at least 0.5",
    "pose": "keypoints with an OKS of at least 0.5",
    "obb": "rotated boxes with an IoU of at least 0.5",
}


@dataclass(frozen=True)
class Result:
    """Holds the result of a run. score, score50: mAP of best.pt, None if it was not measured.

    taught_by: the names of all teachers. teacher, teacher_score, teacher_size: the last one that detects, its mAP50-95,
    and its size. knows_all: whether it has all classes of the data set, without which its score says little.

    task: the student's, which says what the scores compare.
    """

    task: Task
    student: str
    data: str
    epochs: int
    score: float | None
    score50: float | None
    taught_by: str
    teacher: str | None
    teacher_score: float | None
    knows_all: bool
    student_size: ModelSize
    teacher_size: ModelSize | None
    seconds: float

    @property
    def _epochs(self) -> str:
        return f"{self.epochs} epoch{'s' if self.epochs != 1 else ''}"

    @property
    def sentence(self) -> str:
        """Return the result in one sentence."""
        trained = f"After {self._epochs} on {self.data}, {self.student}"
        taught = f"taught by {self.taught_by}" if self.taught_by else "without a teacher"
        if self.score is None:
            return f"{trained}, {taught}, has not been scored."
        reached = f"{trained} reaches {self.task.score_name} {self.score:.3f}"
        if self.teacher_size is None:
            return f"{reached}, {taught}."
        size = percent(self.student_size.parameters / self.teacher_size.parameters)
        if not self.teacher_score or not self.knows_all:
            return f"{reached}, {taught}, with {size} of the parameters of {self.teacher}."
        share = f"{percent(self.score / self.teacher_score)} of what its teacher {self.teacher} reaches"
        return f"{reached}: {share} ({self.teacher_score:.3f}), with {size} of its parameters."

    @property
    def cards(self) -> list[tuple[str, str, str]]:
        """Return (name, number, remark) of the numbers that matter most."""
        small, large = self.student_size, self.teacher_size
        teacher = f"teacher {_score(self.teacher_score)}{'' if self.knows_all else ', without some classes'}"
        cards = [(self.task.score_name, _score(self.score), teacher if large else "")]
        cards.append(("mAP50", _score(self.score50), SCORE50[self.task.name]))
        cards.append(("parameters", _short(small.parameters), f"teacher {_short(large.parameters)}" if large else ""))
        cards.append(("GFLOPs", f"{small.gflops:.1f}", f"teacher {large.gflops:.1f}" if large else "an image"))
        cards.append(("training time", duration(self.seconds), self._epochs))
        return cards


def result(run: Run, history: History, record: Record, pairing: Pairing | None) -> Result:
    """Return what a run has reached. record: what was kept of it. pairing: with the last teacher that detects."""
    metrics = {**run.metrics, **record.scores}
    columns = [run.task.score_column(name) for name in ("mAP50-95", "mAP50")]
    best = history.best_epoch(columns[0])
    if columns[0] not in metrics and best is not None:
        metrics = {name: history.column(name)[history.epochs.index(best)] for name in columns}
    return Result(
        task=run.task,
        student=PurePath(str(run.student.yaml.get("yaml_file") or "the student")).stem,
        data=data_name(str(run.args.data), run.data),
        epochs=len(history.epochs),
        score=metrics.get(columns[0]),
        score50=metrics.get(columns[1]),
        taught_by=run.taught_by,
        teacher=Path(run.teacher.pt_path).name if run.teacher is not None else None,
        teacher_score=record.teacher_score,
        knows_all=pairing is not None and all(pairing.classes.mapping.get(label) for label in run.names),
        student_size=model_size(run.student, run.best, run.imgsz),
        teacher_size=model_size(run.teacher, Path(run.teacher.pt_path), run.imgsz) if run.teacher is not None else None,
        seconds=history.seconds,
    )


def _score(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.3f}"


def _short(number: float) -> str:
    return f"{number / 1e6:.1f} M" if number >= 1e5 else f"{number:,.0f}"


def percent(share: float) -> str:
    """Return a share in percent, as text.

    >>> percent(0.274), percent(0.0001), percent(0.0)
    ('27 %', 'under 1 %', '0 %')
    """
    return "under 1 %" if 0 < share < 0.01 else f"{share * 100:.0f} %"


def duration(seconds: float) -> str:
    """Return a time as a person would say it.

    >>> [duration(seconds) for seconds in (42, 600, 9000)]
    ['42 s', '10 min', '2.5 h']
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def models_table(found: Result) -> Table:
    """Return what each model costs and scores."""
    rows = []
    if found.teacher_size is not None:
        rows.append([f"teacher {found.teacher}", _score(found.teacher_score), *found.teacher_size.cells()])
    rows.append([f"student {found.student_size.name}", _score(found.score), *found.student_size.cells()])
    return Table("Models", ("model", found.task.score_name, "parameters", "GFLOPs", "file"), rows)


def origin_table(run: Run, record: Record) -> Table:
    """Return where a student comes from: its teachers with their hashes, the versions, and the data set."""
    origin = origin_of(run.student)
    rows = [[f"teacher {teacher.file}", f"SHA-256 {teacher.sha256}"] for teacher in origin.teachers]
    if run.teacher is not None and sha256(run.teacher.pt_path) not in {teacher.sha256 for teacher in origin.teachers}:
        rows.append(["note", "the teacher's file is now another one than the training read"])
    rows += [[name, version] for name, version in origin.versions.items()]
    rows.append(["data set", f"{data_name(str(run.args.data), run.data)}, {len(run.data['names'])} classes"])
    for split, skipped in record.skipped.items():
        left_out = f"{skipped.images} skipped as broken" if skipped.images else "none skipped"
        rows.append([f"{split} images", f"{skipped.total}, {left_out}"])
    if not record.skipped:
        rows.append(["images skipped", "not recorded"])
    return Table("Origin", ("", ""), rows)


def pairing_table(pairing: Pairing) -> Table:
    """Return which levels of the two models were paired."""
    rows = [
        [level_name(shape.stride), str(shape.stride), str(shape.student_channels), str(shape.teacher_channels)]
        for shape in pairing.levels
    ]
    return Table("Levels", ("level", "stride", "student's channels", "teacher's channels"), rows)


def settings_tables(settings: Mapping[str, Any]) -> list[Table]:
    """Return the settings that differ from their defaults, and all others; paths without their folders."""
    known: dict[str, Any] = {**DEFAULT_CFG_DICT, **defaults()}
    for method in {key.partition(".")[0] for key in settings if "." in key}:
        values = {**Schedule().model_dump(), **method_defaults(method)}
        known |= {f"{method}.{key}": value for key, value in values.items()}
    names = [key for key in settings if key not in ("save_dir", "project", "name", "trust", "force")]
    changed = [key for key in names if key in ("method", "model") or settings[key] != known.get(key)]
    tables = [("Settings that differ from the defaults", changed)]
    tables.append(("All other settings", [key for key in names if key not in changed]))
    return [Table(title, ("key", "value"), [[key, _value(settings[key])] for key in keys]) for title, keys in tables]


def _value(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    if isinstance(value, str) and is_backbone(value):
        return teacher_name(value)
    if isinstance(value, str):
        return PurePath(value).name if PurePath(value).is_absolute() else value
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def deploy_tables(folder: Path, student: str) -> list[Table]:
    """Return each deploy.csv in a run's folder as a table with its own columns.

    student: the SHA-256 of best.pt. What is left out: a file that is no CSV, one that measured another student, as an
    earlier training in this folder leaves it, and a link, which could lead to a file elsewhere.
    """
    tables = []
    for path in sorted(path for path in folder.rglob(DEPLOY) if not path.is_symlink()):
        try:
            with open(path, encoding="utf-8", newline="") as f:
                lines = [row for row in csv.reader(f) if row][: MAX_ROWS + 1]
                if "sha256" in lines[0] and not any(student in line for line in lines):
                    continue
                shown = [column for column, header in enumerate(lines[0]) if header not in FOR_PROGRAMS]
        except (OSError, ValueError, IndexError, csv.Error):  # also an empty file, and one that is no text
            continue
        headers, *rows = [[_number(row[column]) if column < len(row) else "" for column in shown] for row in lines]
        tables.append(Table(str(path.relative_to(folder)), headers, rows))
    return tables


def _number(text: str) -> str:
    """Return a number with at most four digits that count; other text as it is.

    >>> [_number(text) for text in ("0.12345678", "12", "best.onnx", "")]
    ['0.1235', '12', 'best.onnx', '']
    """
    try:
        return f"{float(text):.4g}" if "." in text else text
    except ValueError:
        return text
