"""What a training says of itself: which maps and classes are paired, and how gradients compare."""

from __future__ import annotations

from pathlib import Path

from ultralytics.utils import LOGGER

from yolokd.pyramid.level import level_name
from yolokd.training.plan import TrainPlan


def log_pairing(plan: TrainPlan) -> None:
    """Log what is paired with what."""
    for paired in plan.teachers:
        name = f"distil from {Path(paired.file).name}"
        for level in paired.pairing.levels:
            LOGGER.info(
                f"{name}, {level_name(level.stride)}: student {level.student_channels} channels, "
                f"teacher {level.teacher_channels}"
            )
        LOGGER.info(f"{name}, {paired.pairing.classes.describe(plan.data['names'])}")


def balance_summary(plan: TrainPlan, means: dict[str, float], clip: float) -> str:
    """Ratios of distillation to task gradient, level by level, as one line of log."""
    names = [key.partition("/")[0] for key in means if key.endswith("/share")]
    ratios = (
        f"{part.name} " + " ".join(f"{n} {means[f'{n}/{part.name}_ratio']:.3g}" for n in names)
        for part in plan.config.method_configs
    )
    share = " ".join(f"{n} {means[f'{n}/share']:.2%}" for n in names)
    return (
        f"gradients, distillation/task: {'; '.join(ratios)}; teacher's confidence: {share}; student's clip {clip:.3g}"
    )
