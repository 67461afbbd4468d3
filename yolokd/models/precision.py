"""Chooses the lowest precision in which a teacher runs fast and still sees what it sees in float32."""

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
LIMIT = 0.02  # ours: largest relative L2 of a level's map to float32
FASTER = 1.3  # ours: a CPU must run a low precision this much faster; a bare win could be chance, and flip between runs
ROUNDS = 3


@dataclass(frozen=True)
class Trial:
    """One precision, tried on a few images: how much faster than float32, and how far from it at each stride."""

    precision: str
    speedup: float
    errors: dict[int, float]

    @property
    def faithful(self) -> bool:
        """Whether every level is within LIMIT; NaN is not."""
        return all(error <= LIMIT for error in self.errors.values())

    def __str__(self) -> str:
        errors = ", ".join(f"{error:.2%} at stride {stride}" for stride, error in self.errors.items())
        return f"{self.precision} {self.speedup:.1f} times as fast as fp32; maps differ by {errors} (relative L2)"


def name_of(dtype: torch.dtype) -> Precision:
    """The precision's name, as `teacher_precision=` takes it."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def candidates(device: torch.device) -> tuple[Precision, ...]:
    """The low precisions that `auto` tries on a device, best first."""
    known: dict[str, tuple[Precision, ...]] = {"cpu": ("bf16",), "cuda": ("fp16", "bf16")}
    return known.get(device.type, ())


def choose_precision(
    teacher: Teacher, images: Tensor, precision: Precision, compiled: bool, imgsz: int | None
) -> tuple[Teacher, list[str]]:
    """The teacher as it will run on the device of `images` (B, channels, H, W), and what to tell the user about it.

    `auto` takes the first precision of `candidates` that is faithful, and on CPUs fast; else float32.
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
        trial = attempt(name, plain, low, images)
        if precision != "auto":
            return low, [f"{trial}" if trial.faithful else f"{trial}, more than the {LIMIT:.0%} that auto allows"]
        if trial.faithful and (images.device.type != "cpu" or trial.speedup >= FASTER):
            return low, [*notes, f"{trial}: taken"]
        notes.append(f"{trial}: not taken")
    return plain, notes


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def attempt(name: str, plain: Teacher, low: Teacher, images: Tensor) -> Trial:
    """Time both, in turn, on the images, and compare their maps."""
    reference, found = plain(images).maps, low(images).maps  # the first run of each is its warm-up too
    errors = {s: _relative(found[s], reference[s]) for s in reference}
    rounds = [(_seconds(lambda: plain(images), images), _seconds(lambda: low(images), images)) for _ in range(ROUNDS)]
    return Trial(name, median(p / q for p, q in rounds), errors)


def _relative(found: Tensor, reference: Tensor) -> float:
    return float((found.float() - reference).norm() / reference.norm())


def _seconds(run: Callable[[], object], images: Tensor) -> float:
    started = clock(images.device)
    run()
    return clock(images.device) - started


def _compile(teacher: Teacher, images: Tensor, notes: list[str]) -> tuple[Teacher, list[str]]:
    """The teacher compiled, or as it is where the compiler cannot."""
    compiled = teacher.with_settings(replace(teacher.settings, compiled=True))
    try:
        compiled(images)
    except Exception as e:  # whatever compilers and toolchains raise
        return teacher, [*notes, f"teacher_compile: {type(e).__name__}: {first_line(e)}; runs uncompiled"]
    return compiled, [*notes, "compiled"]
