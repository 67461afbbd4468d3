"""Where a student comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import ultralytics

from yolokd.models.precision import name_of
from yolokd.training.plan import PairedTeacher, TrainPlan
from yolokd.version import __version__


def provenance(plan: TrainPlan) -> dict[str, Any]:
    """Teacher, method, constants and versions, as plain data that travels in the student's checkpoint."""
    config = plan.config
    teachers = [_teacher(paired) for paired in plan.teachers]
    return {
        "teacher": teachers[0] if len(teachers) == 1 else teachers,
        "method": config.method,
        "balance": config.balance,
        "level_weights": config.level_weights,
        "gains": {p.name: p.gain for p in config.method_configs} if config.balance == "off" else {},
        "schedules": {p.name: p.schedule.model_dump() for p in config.method_configs},
        "stages": list(config.stages or ()),
        "constants": {p.name: p.constants for p in config.method_configs},
        "versions": versions(),
    }


def _teacher(paired: PairedTeacher) -> dict[str, str]:
    precision = name_of(paired.teacher.settings.dtype)  # which `auto` may choose otherwise another time
    return {"file": Path(paired.file).name, "sha256": paired.sha256, "precision": precision}


def versions() -> dict[str, str]:
    """Of what a student depends on."""
    return {
        "yolokd": __version__,
        "ultralytics": ultralytics.__version__,
        "torch": str(torch.__version__),
    }
