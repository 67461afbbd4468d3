"""What a distilled checkpoint says of its origin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yolokd.models.origin import versions
from yolokd.models.teachers.backbone import Backbone
from yolokd.models.teachers.precision import name_of
from yolokd.training.plan import PairedTeacher, TrainPlan


def provenance(plan: TrainPlan) -> dict[str, Any]:
    """Return teacher, method, constants and versions, as plain data that is saved inside the student's checkpoint."""
    config = plan.config
    teachers = [_teacher(paired) for paired in plan.teachers]
    return {
        "teacher": teachers[0] if len(teachers) == 1 else teachers,
        "method": config.method,
        "balance": config.balance,
        "level_weights": config.level_weights,
        "level_floor": config.level_floor,
        "adapter": config.adapter,
        "gains": {method.name: method.gain for method in config.method_configs} if config.balance == "off" else {},
        "schedules": {method.name: method.schedule.model_dump() for method in config.method_configs},
        "teachers": config.teachers,
        "levels": list(config.levels or ()),
        "stages": list(config.stages or ()),
        "constants": {method.name: method.constants for method in config.method_configs},
        "classes_map": dict(config.classes_map or {}),
        "teacher_channels": list(config.teacher_channels or ()),
        "unlabelled": {"images": len(plan.unlabelled), "ratio": config.unlabelled_ratio if plan.unlabelled else 0.0},
        "versions": versions(),
    }


def _teacher(paired: PairedTeacher) -> dict[str, str]:
    precision = name_of(paired.teacher.settings.dtype)  # `auto` may choose another one on another device
    weights = {"weights": paired.model.weights} if isinstance(paired.model, Backbone) else {}
    return {"file": paired.name, "sha256": paired.sha256, "precision": precision, **weights}


def flattened(record: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested dictionaries and lists as one dictionary; its values are texts, numbers and booleans.

    >>> flattened({"method": "dfd", "constants": {"dfd": {"alpha": 0.1}}, "stages": [0, 10]})
    {'method': 'dfd', 'constants.dfd.alpha': 0.1, 'stages.0': 0, 'stages.1': 10}
    """
    flat: dict[str, Any] = {}
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flat |= flattened(dict(enumerate(value)), f"{name}.")
        else:
            flat[name] = value if isinstance(value, str | int | float) else str(value)
    return flat
