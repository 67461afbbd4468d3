"""Measures one model in one format: exports it, scores the file, and times it in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from yolokd.commands.deploy.formats import Format
from yolokd.commands.deploy.latency import LatencyRequest, RuntimeFailure, measure_in_process
from yolokd.commands.deploy.ledger import NOT_SCORED, TEACHER, DeployRow
from yolokd.errors import UserError, first_line
from yolokd.exporter import export
from yolokd.models.checkpoint import load_model
from yolokd.models.detector import Detector, image_channels
from yolokd.models.evaluate import ClassScores, aligned_copy, score_by_class
from yolokd.models.tasks import Task, scored_task
from yolokd.models.teacher import seen_channels
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.safe_models import own_exports
from yolokd.pyramid.pairing import pair_classes

Say = Callable[[str], None]  # shows what is being done


@dataclass(frozen=True)
class Measurement:
    """The conditions under which all models and formats are measured.

    data: path of the data set's .yaml; dataset: Ultralytics' dictionary of it. task: the student's. imgsz: in pixels.
    single_cls: whether all classes count as one. classes_map, teacher_channels: of the student's training.
    """

    data: str
    dataset: Mapping[str, Any]
    task: Task
    split: str
    imgsz: int
    threads: int
    trust: bool
    single_cls: bool = False
    classes_map: Mapping[str, str] | None = None
    teacher_channels: Sequence[int] | None = None

    def checkpoint(self, row: DeployRow, file: Path, say: Say) -> DeployRow:
        """Measure a checkpoint; return its row, completed. A class that it does not know counts as never detected."""
        module, _ = load_model(file, row.model, self.trust)
        row = row.model_copy(update={"megabytes": megabytes(file)})
        if scored_task(module, self.task, self.dataset) is not self.task:
            return row.model_copy(update={"problem": f"is no model of the task {self.task.name}, and is not scored"})
        is_teacher, names, own = row.model == TEACHER, self.dataset["names"], image_channels(module)
        mapping = pair_classes(module.names, names, self.classes_map if is_teacher else None).mapping
        if not mapping:
            return row.model_copy(update={"problem": "knows none of the data set's classes"})
        try:
            channels = seen_channels(own, self.dataset["channels"], self.teacher_channels if is_teacher else None)
        except UserError as e:
            return row.model_copy(update={"problem": e.problem})
        return self._run(row, file, aligned_copy(module, names, mapping, self.task, channels), own, say)

    def exported(self, row: DeployRow, checkpoint: Path, each: Format, folder: Path, say: Say) -> DeployRow:
        """Export a checkpoint in a format into a folder, and measure the file; return its row, completed.

        What fails is the row's `problem`: a package that is not installed, a format that does not run here.
        """
        say("exporting")
        try:
            into = folder / each.checkpoint_name(checkpoint)
            report = export(
                checkpoint,
                data=self.data,
                trust=self.trust,
                into=into,
                show=False,
                imgsz=self.imgsz,
                **each.options,
            )
        except UserError as e:
            return row.model_copy(update={"problem": f"{e.problem} ({e.cure})"})
        except Exception as e:  # exporters raise errors of many types
            return row.model_copy(update={"problem": f"was not exported: {first_line(e)}"})
        parity = "" if report.parity is None else "pass" if report.passed else "FAIL"
        made = {"file": report.path.name, "megabytes": megabytes(report.path), "parity": parity}
        row = row.model_copy(update=made)
        return self._run(row, report.path, str(report.path), self.dataset["channels"], say)

    def _run(self, row: DeployRow, file: Path, model: Detector | str, channels: int, say: Say) -> DeployRow:
        """Time a file, then score its model; a runtime that crashes does so in the other process.

        channels: of the images that the file takes.
        """
        say("latency")
        size = (self.imgsz, self.imgsz)
        try:
            latency = measure_in_process(LatencyRequest(file, size, channels, self.threads, self.trust))
        except RuntimeFailure as e:
            return row.model_copy(update={"problem": f"does not run here: {e}"})
        say("mAP")
        try:
            scores = self._score(model)
        except Exception as e:  # whatever a runtime raises
            return row.model_copy(update={**vars(latency), "problem": f"{NOT_SCORED}: {first_line(e)}"})
        worst = min(scores.by_class, key=scores.by_class.__getitem__)
        scored = {"map": scores.map, "map50": scores.map50, "images": scores.images}
        classes = {"ap_by_class": json.dumps(scores.by_class), "worst_class": worst, "worst_ap": scores.by_class[worst]}
        return row.model_copy(update={**vars(latency), **scored, **classes})

    def _score(self, model: Detector | str) -> ClassScores:
        """Score on the whole split, on square images: a static file sees all others as such, too."""
        settings = {"data": self.data, "split": self.split, "imgsz": self.imgsz, "single_cls": self.single_cls}
        settings |= {"batch": 1, "rect": False, "device": "cpu", "verbose": False}
        with safe_loading(self.trust), own_exports(), TemporaryDirectory() as folder:
            scores = score_by_class(model, settings, Path(folder), self.task, self.dataset["names"])
        if not scores.by_class:
            raise ValueError(f"the images of the split {self.split} have no labels")
        return scores


def megabytes(path: Path) -> float:
    """Return the size of a file, or of all files of a folder, in millions of bytes."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6
