"""What a training says of itself: which maps and classes are paired, and how gradients compare."""

from __future__ import annotations

from pathlib import Path

from ultralytics.utils import LOGGER

from yolokd.plan import Plan
from yolokd.pyramid import level_name


def announce(plan: Plan) -> None:
    """Log what is paired with what."""
    for lesson in plan.lessons:
        name = f"distil from {Path(lesson.file).name}"
        for level in lesson.pairing.levels:
            LOGGER.info(
                f"{name}, {level_name(level.stride)}: student {level.student_channels} channels, "
                f"teacher {level.teacher_channels}"
            )
        LOGGER.info(f"{name}, {lesson.pairing.classes.in_words(plan.data['names'])}")


def balance_line(plan: Plan, means: dict[str, float], clip: float) -> str:
    """Ratios of distillation to task gradient, level by level, as one line of log."""
    names = [key.partition("/")[0] for key in means if key.endswith("/share")]
    ratios = (
        f"{part.name} " + " ".join(f"{n} {means[f'{n}/{part.name}_ratio']:.3g}" for n in names)
        for part in plan.config.parts
    )
    share = " ".join(f"{n} {means[f'{n}/share']:.2%}" for n in names)
    return (
        f"gradients, distillation/task: {'; '.join(ratios)}; teacher's confidence: {share}; student's clip {clip:.3g}"
    )
