"""Measures one model in one format: exports it, scores the file, and times it in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from yolokd.commands.apart import ProcessFailure
from yolokd.commands.deploy.formats import Format
from yolokd.commands.deploy.latency import LatencyRequest, measure_in_process
from yolokd.commands.deploy.ledger import NOT_SCORED, TEACHER, DeployRow
from yolokd.errors import UserError, first_line
from yolokd.exporter.export_model import export_into
from yolokd.models.checkpoint import load_model
from yolokd.models.detector import Detector, image_channels
from yolokd.models.evaluate import ClassScores, copy_for_data, score_by_class
from yolokd.models.origin import Origin
from yolokd.models.tasks import Task, scored_task
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.safe_models import own_exports
from yolokd.pyramid.pairing import pair_classes
from yolokd.runtime.console import CONSOLE

Say = Callable[[str], None]  # shows what is being done


@dataclass(frozen=True)
class Measurement:
    """The conditions under which all models and formats are measured.

    data: path of the data set's .yaml; dataset: Ultralytics' dictionary of it. task: the student's. imgsz: in pixels.
    single_cls: whether all classes count as one. origin: the student's, with what the training mapped for its teacher.
    """

    data: str
    dataset: Mapping[str, Any]
    task: Task
    split: str
    imgsz: int
    threads: int
    trust: bool
    single_cls: bool
    origin: Origin

    def checkpoint(self, row: DeployRow, file: Path, say: Say) -> DeployRow:
        """Measure a checkpoint; return its row, completed. A class that it does not know counts as never detected."""
        module, _ = load_model(file, row.model, self.trust)
        row = row.model_copy(update={"megabytes": megabytes(file)})
        if scored_task(module, self.task, self.dataset) is not self.task:
            return row.model_copy(update={"problem": f"is no model of the task {self.task.name}, and is not scored"})
        origin = self.origin if row.model == TEACHER else Origin.model_validate({})
        names = self.dataset["names"]
        mapping = pair_classes(module.names, names, origin.classes_map).mapping
        if not mapping:
            return row.model_copy(update={"problem": "knows none of the data set's classes"})
        try:
            model = copy_for_data(module, self.dataset, self.task, mapping, origin.teacher_channels)
        except UserError as e:
            return row.model_copy(update={"problem": e.problem})
        if unknown := [name for i, name in names.items() if i not in mapping]:
            CONSOLE.print(f"{row.name} does not know {', '.join(unknown)}, and never detects them")
        return self._run(row, file, model, image_channels(module), say)

    def exported(self, row: DeployRow, checkpoint: Path, each: Format, folder: Path, say: Say) -> DeployRow:
        """Export a checkpoint in a format into a folder, and measure the file; return its row, completed.

        What fails is the row's `problem`: a package that is not installed, a format that does not run here.
        """
        say("exporting")
        try:
            options = {"imgsz": self.imgsz, **each.options}
            report = export_into(folder / each.checkpoint_name(checkpoint), checkpoint, self.data, self.trust, options)
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
        except ProcessFailure as e:
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
