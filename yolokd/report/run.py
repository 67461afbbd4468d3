"""A run's folder, as its report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from yolokd.config.parse import parse, split_keys, without_trust
from yolokd.config.schema import DistillationConfig
from yolokd.data.dataset import learned_names, load_data
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model, load_teacher
from yolokd.models.detector import Detector, rounded_imgsz
from yolokd.models.tasks import TASKS, Task, task_of
from yolokd.models.teachers.backbone import is_backbone, teacher_name
from yolokd.runtime.console import warnings_only

CURE = "give the folder of a run, such as runs/distill/train"


@dataclass(frozen=True)
class Run:
    """A run: its settings, its data set, its trained student, and the last of its teachers that is a detector.

    settings: flat, as in distill.yaml. args: Ultralytics' settings. best: the student's checkpoint. teacher: None
    without one. metrics: the checkpoint's scores. finished: whether the
    training has ended.
    """

    folder: Path
    settings: dict[str, Any]
    config: DistillationConfig
    args: Any
    data: dict[str, Any]
    best: Path
    student: Detector
    teacher: Detector | None
    metrics: Mapping[str, Any]
    finished: bool

    @property
    def taught_by(self) -> str:
        """Return the names of all teachers; empty without one."""
        return ", ".join(map(teacher_name, self.config.teacher_files)) if self.config.method_configs else ""

    @property
    def names(self) -> dict[int, str]:
        """Return the classes that the student learned."""
        return learned_names(self.data, self.args.classes)

    @property
    def task(self) -> Task:
        """Return the student's task."""
        return _task(self.student)

    @property
    def imgsz(self) -> int:
        """Return the side of the training's images in pixels, as Ultralytics rounds it."""
        return rounded_imgsz(self.args.imgsz, self.student)


def open_run(folder: Path, given: Mapping[str, Any]) -> Run:
    """Read the folder of a run of yolokd or of plain Ultralytics.

    given: settings that replace those of the folder: `teacher` and `data`, if their files have moved, and `trust`.
    Raises UserError if the folder holds no run with a checkpoint, and if the teacher or the data set is not there.
    """
    settings = _read_settings(folder) | dict(given)
    keys = split_keys(settings)
    config = parse(keys.distillation)
    known = {k: v for k, v in keys.ultralytics.items() if k in DEFAULT_CFG_DICT and k != "model"}
    with warnings_only():
        args = get_cfg(overrides=known)
    best = next((path for name in ("best", "last") if (path := folder / "weights" / f"{name}.pt").is_file()), None)
    if best is None:
        raise UserError(f"run={folder}", "has no checkpoint in its folder weights", CURE)
    student, checkpoint = load_model(best, "run", config.trust)
    args.task = _task(student).name  # which says how Ultralytics reads the labels
    files = [file for file in config.teacher_files if config.method_configs and not is_backbone(file)]
    teacher = load_teacher(files[-1], config.trust) if files else None
    data = load_data(args.data, bool(args.single_cls), trust=config.trust, split=args.split)
    if len(student.names) > len(data["names"]):
        problem = f"has {len(data['names'])} classes, and the student knows {len(student.names)}"
        raise UserError(f"data={args.data}", problem, "give the data set that it was trained on")
    metrics = checkpoint.get("train_metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    finished = checkpoint.get("optimizer") is None
    return Run(folder, settings, config, args, data, best, student, teacher, metrics, finished)


def _read_settings(folder: Path) -> dict[str, Any]:
    """Return the settings in distill.yaml; for a run of plain Ultralytics, those in args.yaml, with method=none."""
    for name, more in (("distill.yaml", {}), ("args.yaml", {"method": "none"})):
        if (path := folder / name).is_file():
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as e:
                raise UserError(f"run={folder}", f"its {name} cannot be read", CURE) from e
            if not isinstance(content, dict):
                raise UserError(f"run={folder}", f"its {name} holds no settings", CURE)
            return without_trust(content, str(path)) | more
    raise UserError(f"run={folder}", "is no folder of a run", CURE)


def _task(student: Detector) -> Task:
    return task_of(student) or TASKS["detect"]
