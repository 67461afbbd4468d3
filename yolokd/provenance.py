"""Where a student comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import ultralytics

import yolokd
from yolokd.plan import Plan


def provenance(plan: Plan) -> dict[str, Any]:
    """Teacher, method, constants and versions, as plain data that travels in the student's checkpoint."""
    config = plan.config
    teachers = [{"file": Path(lesson.file).name, "sha256": lesson.sha256} for lesson in plan.lessons]
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


def versions() -> dict[str, str]:
    """Of what a student depends on."""
    return {
        "yolokd": yolokd.__version__,
        "ultralytics": ultralytics.__version__,
        "torch": str(torch.__version__),
    }
