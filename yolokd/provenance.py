"""Where a student comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import ultralytics

import yolokd
from yolokd.plan import Lesson, Plan
from yolokd.precision import name_of


def provenance(plan: Plan) -> dict[str, Any]:
    """Teacher, method, constants and versions, as plain data that travels in the student's checkpoint."""
    config = plan.config
    teachers = [_teacher(lesson) for lesson in plan.lessons]
    return {
        "teacher": teachers[0] if len(teachers) == 1 else teachers,
        "method": config.method,
        "balance": config.balance,
        "level_weights": config.level_weights,
        "gains": {p.name: p.gain for p in config.parts} if config.balance == "off" else {},
        "schedules": {p.name: p.schedule.model_dump() for p in config.parts},
        "stages": list(config.stages or ()),
        "constants": {p.name: p.constants for p in config.parts},
        "versions": versions(),
    }


def _teacher(lesson: Lesson) -> dict[str, str]:
    precision = name_of(lesson.teacher.engine.dtype)  # which `auto` may choose otherwise another time
    return {"file": Path(lesson.file).name, "sha256": lesson.sha256, "precision": precision}


def versions() -> dict[str, str]:
    """Of what a student depends on."""
    return {
        "yolokd": yolokd.__version__,
        "ultralytics": ultralytics.__version__,
        "torch": str(torch.__version__),
    }
