"""Choice of a low precision in which a teacher runs fast and its feature maps stay close to those in float32."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch
from torch import Tensor

from yolokd.config.schema import Precision
from yolokd.errors import first_line
from yolokd.models.teacher import InferenceSettings, Teacher

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_ERROR = 0.02  # ours: largest relative L2 distance of a level's map to that in float32
# Ours: a low precision must be this many times as fast on a CPU. A smaller gain could be chance, and the choice would
# then differ between runs.
MIN_SPEEDUP = 1.3
ROUNDS = 3


@dataclass(frozen=True)
class Trial:
    """The measurements of one precision on a few images.

    speedup: how many times as fast as float32. errors: {stride: relative L2 distance of the map to that in float32}.
    """

    precision: str
    speedup: float
    errors: dict[int, float]

    @property
    def faithful(self) -> bool:
        """Return whether the error of every level is at most MAX_ERROR; NaN is not."""
        return all(error <= MAX_ERROR for error in self.errors.values())

    def __str__(self) -> str:
        errors = ", ".join(f"{error:.2%} at stride {stride}" for stride, error in self.errors.items())
        return f"{self.precision} {self.speedup:.1f} times as fast as fp32; maps differ by {errors} (relative L2)"


def name_of(dtype: torch.dtype) -> Precision:
    """Return the name of a precision, as `teacher_precision=` takes it."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def candidates(device: torch.device) -> tuple[Precision, ...]:
    """Return the low precisions that `auto` tries on a device, best first."""
    by_device: dict[str, tuple[Precision, ...]] = {"cpu": ("bf16",), "cuda": ("fp16", "bf16")}
    return by_device.get(device.type, ())


def choose_precision(
    teacher: Teacher, images: Tensor, precision: Precision, compiled: bool, imgsz: int | None
) -> tuple[Teacher, list[str]]:
    """Return the teacher as it will run on the device of `images`, and notes on the choice for the user.

    `auto` takes the first of `candidates` that is faithful and, on CPUs, fast; otherwise float32.
    images: (B, channels, H, W) in 0..1. compiled: whether to use torch.compile. imgsz: as in InferenceSettings.
    """
    plain = teacher.with_settings(InferenceSettings(channels_last=images.device.type in {"cpu", "cuda"}, imgsz=imgsz))
    chosen, notes = _choose(plain, images, precision)
    if compiled:
        return _compile(chosen, images, notes)
    return chosen, notes


def _choose(plain: Teacher, images: Tensor, precision: Precision) -> tuple[Teacher, list[str]]:
    if precision == "fp32":
        return plain, []
    notes: list[str] = []
    for name in candidates(images.device) if precision == "auto" else (precision,):
        low = plain.with_settings(replace(plain.settings, dtype=DTYPES[name]))
        trial = measure_precision(name, plain, low, images)
        if precision != "auto":
            return low, [f"{trial}" if trial.faithful else f"{trial}, more than the {MAX_ERROR:.0%} that auto allows"]
        if trial.faithful and (images.device.type != "cpu" or trial.speedup >= MIN_SPEEDUP):
            return low, [*notes, f"{trial}: taken"]
        notes.append(f"{trial}: not taken")
    return plain, notes


def clock(device: torch.device) -> float:
    """Return the time in seconds, after the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_precision(name: str, plain: Teacher, low: Teacher, images: Tensor) -> Trial:
    """Compare a teacher in the precision `name` with `plain`, in float32: their times, in turn, and their maps."""
    reference, maps = plain(images).maps, low(images).maps  # also the warm-up of both
    errors = {stride: _relative_error(maps[stride], reference[stride]) for stride in reference}
    rounds = [(_seconds(lambda: plain(images), images), _seconds(lambda: low(images), images)) for _ in range(ROUNDS)]
    return Trial(name, median(p / q for p, q in rounds), errors)


def _relative_error(actual: Tensor, reference: Tensor) -> float:
    return float((actual.float() - reference).norm() / reference.norm())


def _seconds(run: Callable[[], object], images: Tensor) -> float:
    started = clock(images.device)
    run()
    return clock(images.device) - started


def _compile(teacher: Teacher, images: Tensor, notes: list[str]) -> tuple[Teacher, list[str]]:
    """Return the compiled teacher, or the teacher itself if the compilation fails."""
    compiled = teacher.with_settings(replace(teacher.settings, compiled=True))
    try:
        compiled(images)
    except Exception as e:  # whatever compilers and toolchains raise
        return teacher, [*notes, f"teacher_compile: {type(e).__name__}: {first_line(e)}; runs uncompiled"]
    return compiled, [*notes, "compiled"]
