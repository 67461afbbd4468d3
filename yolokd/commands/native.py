"""What Ultralytics' own distillation, `method=native`, cannot train."""

from __future__ import annotations

from collections.abc import Sequence

from yolokd.errors import UserError
from yolokd.models.checkpoint import student_task
from yolokd.models.detector import Detector, read_pyramid
from yolokd.models.teachers.backbone import is_backbone

CURE = "drop native, for example method=none,fitnet"


def check_native(student: object, teachers: Sequence[object], trust: bool) -> None:
    """Raise UserError for teachers and students that Ultralytics' own distillation does not take."""
    for teacher in teachers:
        if is_backbone(teacher):
            raise UserError("method=native", "takes no timm backbone as a teacher", CURE)
    if any(student_task(model, trust) == "rtdetr" for model in (student, *teachers)):
        raise UserError("method=native", "distils between YOLO models only", CURE)


def check_same_levels(student: Detector, teacher: Detector) -> None:
    """Raise UserError if two models' maps have other strides: Ultralytics' own distillation pairs them in order."""
    strides = [list(read_pyramid(model)) for model in (student, teacher)]
    if strides[0] != strides[1]:
        problem = f"needs equal strides, and the student has {strides[0]}, the teacher {strides[1]}"
        raise UserError("method=native", problem, "drop native")
