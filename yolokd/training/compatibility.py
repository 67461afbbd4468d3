"""Check that models and settings fit together; each check raises UserError for what does not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils import LOGGER

from yolokd.config.schema import DistillationConfig
from yolokd.data.dataset import sample_batch
from yolokd.distillation.per_level import build_methods, needs_labels
from yolokd.errors import UserError
from yolokd.methods import registered
from yolokd.models.tasks import Task
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.level import LevelShape, level_name
from yolokd.pyramid.pairing import Pairing

TRIAL_IMGSZ = 64  # ours: the image size in pixels at which a teacher is tried before anything is written


def check_stages(config: DistillationConfig, args: Any) -> None:
    """Check that the turn of each teacher comes. args: Ultralytics' settings."""
    if args.time and config.teachers == "stages" and len(config.teacher_files) > 1:
        why = "changes the number of epochs during the training, and by this number teachers take turns"
        raise UserError(f"time={args.time:g}", why, "give epochs=, or teachers=ensemble")
    if config.starts(args.epochs)[-1] >= args.epochs:
        problem = f"leaves no epoch of {args.epochs} to the last teacher"
        raise UserError(f"stages={list(config.stages or ())}", problem, "begin it earlier")


def log_frozen_levels(
    config: DistillationConfig, pairings: Sequence[Pairing], strides: Iterable[int], changing: Sequence[int]
) -> None:
    """Warn of levels that are not taught because `freeze=` keeps the student's map there as it is.

    strides: the student's. changing: those at which training changes its map.
    """
    frozen = [stride for stride in strides if stride not in changing and stride in (config.levels or strides)]
    if frozen:
        taught = {level.stride for pairing in pairings for level in pairing.levels}
        names = [", ".join(map(level_name, sorted(some))) for some in (frozen, taught)]
        LOGGER.warning(f"freeze: keeps the feature map at {names[0]} as it is: the teacher teaches at {names[1]} only")


def check_level_floor(config: DistillationConfig, teachers: Sequence[Teacher]) -> None:
    """Check that a teacher's confidence weights the levels, if a floor is to lie under these weights."""
    if config.level_floor > 0 and not any(teacher.has_logits for teacher in teachers):
        why = "has no effect: the teacher scores no classes, so that all levels weigh the same"
        raise UserError(f"level_floor={config.level_floor:g}", why, "drop it")


def check_shapes(data: object, task: Task) -> None:
    """Check that a drawn data set has the labels of the student's task."""
    if task.own and data != task.shapes:
        raise UserError(
            f"data={data}", f"has no labels of {task.own}, which the student finds", f"give data={task.shapes}"
        )


def check_distinct(teacher: object, student: object) -> None:
    """Check that teacher and student are not the same file."""
    if isinstance(student, str | Path) and teacher is not None:
        t, s = Path(str(teacher)), Path(student)
        if t == s or (t.exists() and s.exists() and t.samefile(s)):
            raise UserError(f"student={student}", "is the teacher's own file", "give a smaller model as the student")


def check_outputs(file: str, teacher: Teacher, config: DistillationConfig) -> None:
    """Check that a teacher has the outputs that the methods compare."""
    needing = [method.name for method in config.method_configs if registered()[method.name].wants_dense_head()]
    if needing and not teacher.has_logits:
        raise UserError(
            f"teacher={file}",
            f"has no class scores and boxes per position, which {needing[0]} needs",
            "use a YOLO teacher, or methods that compare feature maps alone, such as dfd",
        )


def check_student_without_scores(argument: str, config: DistillationConfig) -> None:
    """Check that an RT-DETR can learn what is asked: no position of its maps has a class score or a box."""
    for name in (method.name for method in config.method_configs):
        method = registered()[name]
        if method.wants_student_head():
            problem = f"has no class scores and boxes per position, which {name} needs"
            raise UserError(argument, problem, "use a YOLO student, or methods that compare feature maps, such as dfd")
    if config.unlabelled is not None:
        problem = "an RT-DETR's loss would count the objects in images without labels as background"
        raise UserError(f"unlabelled={config.unlabelled}", problem, "drop it, or use a YOLO student")


def check_methods(config: DistillationConfig, levels: Sequence[LevelShape]) -> None:
    """Check that the methods, which are built here, can work with the models' shapes and the settings."""
    built = build_methods(config.method_configs, levels, seed=0)
    if config.unlabelled is not None and all(map(needs_labels, built)):
        why = f"would not be used: method={config.method} learns from labelled images alone"
        raise UserError(f"unlabelled={config.unlabelled}", why, "add a method such as fitnet, or drop it")
    for method, per_level in zip(config.method_configs, built, strict=True):
        if config.teacher_imgsz is not None and any(m.wants_box_logits for m in per_level.children()):
            problem = f"gives the teacher cells of another size, and {method.name} compares distances counted in cells"
            raise UserError(f"teacher_imgsz={config.teacher_imgsz}", problem, "drop it, or use bckd")
        if any(m.wants_boxes or m.wants_box_logits for m in per_level.children()):
            _check_upright(method.name, levels)


def _check_upright(method: str, levels: Sequence[LevelShape]) -> None:
    """Check that a method which compares boxes gets upright ones: sides of others mean nothing without angles."""
    for model, head in (("teacher", levels[0].teacher_head), ("student", levels[0].student_head)):
        if head is not None and head.rotated:
            weight = registered()[method].box_weight
            cure = f"give {method}.{weight}=0" if weight else "use another method, such as bckd with bckd.alpha_2=0"
            raise UserError(f"method={method}", f"compares upright boxes, and those of the {model} are rotated", cure)


def check_finite(file: str, teacher: Teacher, data: Mapping[str, Any]) -> None:
    """Check that the teacher's maps, class scores and boxes of a validation image are finite."""
    requested = RequestedOutputs(logits=teacher.has_logits, boxes=teacher.has_logits)
    output = teacher(sample_batch(dict(data), TRIAL_IMGSZ)[:1], requested)
    for name, values in (("feature maps", output.maps), ("class scores", output.logits), ("boxes", output.boxes)):
        for stride, tensor in values.items():
            if not torch.isfinite(tensor).all():
                problem = f"its {name} at stride {stride} are not finite on a validation image"
                raise UserError(f"teacher={file}", problem, "give one that is trained; its weights may hold NaN")
