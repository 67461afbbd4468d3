"""Choice of a low precision in which a teacher runs fast and its feature maps stay close to those in float32."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from yolokd.config.schema import Precision
from yolokd.errors import first_line
from yolokd.models.teachers.teacher import InferenceSettings, Teacher

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_ERROR = 0.02  # ours: largest relative L2 distance of a level's map to that in float32
# From these compute capabilities on, NVIDIA's tensor cores multiply in that precision.
CUDA_CAPABILITIES: dict[Precision, tuple[int, int]] = {"fp16": (7, 0), "bf16": (8, 0)}


@dataclass(frozen=True)
class Trial:
    """The measurements of one precision on a few images.

    errors: {stride: relative L2 distance of the map to that in float32}.
    """

    precision: str
    errors: dict[int, float]

    @property
    def faithful(self) -> bool:
        """Return whether the error of every level is at most MAX_ERROR; NaN is not."""
        return all(error <= MAX_ERROR for error in self.errors.values())

    def __str__(self) -> str:
        errors = ", ".join(f"{error:.2%} at stride {stride}" for stride, error in self.errors.items())
        return f"{self.precision}: maps differ from those in fp32 by {errors} (relative L2)"


def name_of(dtype: torch.dtype) -> Precision:
    """Return the name of a precision, as `teacher_precision=` takes it."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def fast_precisions(device: torch.device) -> tuple[Precision, ...]:
    """Return the low precisions that a device has instructions for, best first.

    The device alone decides, not a measurement of time, so that a command makes the same choice each time.
    """
    if device.type == "cpu":
        return ("bf16",) if _cpu_multiplies_bfloat16() else ()
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return tuple(name for name, least in CUDA_CAPABILITIES.items() if capability >= least)
    return ()


def _cpu_multiplies_bfloat16() -> bool:
    """Return whether the CPU has AMX or AVX512-BF16; elsewhere bfloat16 is emulated, and slower than float32."""
    supported: bool = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return supported


def choose_precision(
    teacher: Teacher,
    images: Tensor,
    precision: Precision,
    imgsz: int | None,
    batch: int | None = None,
    compiled: bool = False,
) -> tuple[Teacher, list[str]]:
    """Return the teacher as it will run on the device of `images`, and notes on the choice for the user.

    `auto` takes the first of `fast_precisions` that is faithful; otherwise float32.
    images: (B, channels, H, W) in 0..1, of the training's size. imgsz: as in InferenceSettings. batch: the number of
    images in the training's batches, which on CUDA run as a graph; None if unknown. compiled: whether the teacher is
    compiled for them.
    """
    settings = InferenceSettings(
        channels_last=images.device.type in {"cpu", "cuda"},
        graph_for=None if batch is None else (batch, *images.shape[1:]),
        imgsz=imgsz,
    )
    chosen, notes = _choose(teacher.with_settings(settings), images, precision)
    if batch is None or not compiled:
        return chosen, notes
    return _compile(chosen, images[torch.arange(batch) % len(images)], notes)


def _choose(plain: Teacher, images: Tensor, precision: Precision) -> tuple[Teacher, list[str]]:
    if precision == "fp32":
        return plain, []
    candidates = fast_precisions(images.device) if precision == "auto" else (precision,)
    notes: list[str] = []
    for name in candidates:
        low = plain.with_settings(replace(plain.settings, dtype=DTYPES[name]))
        trial = measure_precision(name, plain, low, images)
        if precision != "auto":
            return low, [f"{trial}" if trial.faithful else f"{trial}, more than the {MAX_ERROR:.0%} that auto allows"]
        if trial.faithful:
            return low, [*notes, f"{trial}: taken"]
        notes.append(f"{trial}: not taken")
    return plain, notes or [f"this {images.device.type.upper()} has no fast instructions below fp32"]


def measure_precision(name: str, plain: Teacher, low: Teacher, images: Tensor) -> Trial:
    """Compare the maps of a teacher that runs as `name` says with those of `plain`."""
    reference, maps = plain(images).maps, low(images).maps
    return Trial(name, {stride: _relative_error(maps[stride], reference[stride]) for stride in reference})


def _relative_error(actual: Tensor, reference: Tensor) -> float:
    return float((actual.float() - reference).norm() / reference.float().norm())


def _compile(teacher: Teacher, images: Tensor, notes: list[str]) -> tuple[Teacher, list[str]]:
    """Return the teacher compiled for batches like `images`, or itself if that fails or gives other maps."""
    compiled = teacher.with_settings(replace(teacher.settings, compiled_for=tuple(images.shape)))
    try:
        trial = measure_precision("compiled", teacher, compiled, images)
    except Exception as e:  # whatever compilers and toolchains raise
        return teacher, [*notes, f"teacher_compile: {type(e).__name__}: {first_line(e)}; runs uncompiled"]
    if not trial.faithful:
        return teacher, [*notes, f"{trial}: not taken"]
    return compiled, [*notes, "compiled"]
