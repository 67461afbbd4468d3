"""The summary at the end of a run: each teacher and the student, side by side."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from ultralytics.utils import LOGGER

from yolokd.models.size import ModelSize, backbone_size, model_size
from yolokd.models.teachers.backbone import Backbone, is_backbone
from yolokd.runtime.console import make_console, table_width


def teacher_sizes(trainer: Any) -> list[ModelSize]:
    """Return the sizes of a trainer's teachers, while it still has the whole models."""
    imgsz = trainer.args.imgsz
    return [
        backbone_size(paired.model, paired.name, imgsz)
        if isinstance(paired.model, Backbone)
        else model_size(paired.model, Path(paired.model.pt_path), imgsz)
        for paired in trainer.plan.teachers
    ]


def log_summary(trainer: Any) -> None:
    """Log the table of a finished run, if this process has trained it with a teacher."""
    if trainer.plan.teachers:
        LOGGER.info(run_summary(trainer, trainer._teacher_sizes))


def run_summary(trainer: Any, teachers: Sequence[ModelSize]) -> str:
    """Return a table of a finished run as text: scores of teachers and student, and what each model costs."""
    imgsz, task = trainer.args.imgsz, trainer.plan.task
    column = task.score_column("mAP50-95")
    title = f"result on the validation set, images of {imgsz} pixels"
    table = Table("model", task.score_name, "parameters", "GFLOPs", "file", title=title, title_justify="left")
    detectors = [index for index, paired in enumerate(trainer.plan.teachers) if not is_backbone(paired.file)]
    for index, teacher in enumerate(teachers):
        score = trainer.teacher_score if index in detectors[-1:] else None  # a trainer keeps that of the last detector
        table.add_row(f"teacher {teacher.name}", "not measured" if score is None else f"{score:.3f}", *teacher.cells())
    if trainer.args.val and (first := _first_row(trainer.csv, column)):
        table.add_row(f"student after epoch {first['epoch']}", f"{float(first[column]):.3f}")
    student = model_size(trainer.ema.ema, trainer.best if trainer.best.exists() else trainer.last, imgsz)
    table.add_row(f"student {student.name}", f"{trainer.metrics[column]:.3f}", *student.cells())
    console = make_console(width=table_width())
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _first_row(path: Path, score: str) -> dict[str, str] | None:
    """Return the first row of results.csv, or None if its column `score` is empty."""
    if not path.exists():
        return None
    with open(path, encoding="utf-8") as f:
        row = next(csv.DictReader(f, skipinitialspace=True), None)
    return row if row is not None and row.get(score) else None
