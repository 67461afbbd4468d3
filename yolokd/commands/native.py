"""What Ultralytics' own distillation, `method=native`, cannot train."""

from __future__ import annotations

from collections.abc import Sequence

from yolokd.errors import UserError
from yolokd.models.backbone import is_backbone
from yolokd.models.checkpoint import student_task


def check_native(student: object, teachers: Sequence[object], trust: bool) -> None:
    """Raise UserError for teachers and students that Ultralytics' own distillation does not take."""
    for teacher in teachers:
        if is_backbone(teacher):
            raise UserError("method=native", "takes no timm backbone as a teacher", "give method=none,fitnet, say")
    if any(student_task(model, trust) == "rtdetr" for model in (student, *teachers)):
        raise UserError("method=native", "distils between YOLO models only", "give method=none,fitnet, say")
