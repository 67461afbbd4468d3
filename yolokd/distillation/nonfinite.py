"""Losses and gradients that are not finite: drop them for a step, count them, and give up after ten in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from ultralytics.utils import LOGGER

from yolokd.errors import UserError
from yolokd.pyramid.level import Level, level_name
from yolokd.runtime.late_flags import LateFlags

MAX_STEPS_IN_A_ROW = 10  # ours: after so many steps without distillation the training stops
# Ours: a gradient scaler starts at 2^16 and halves its scale at each step that it skips: so many halvings are enough.
MAX_SKIPPED_IN_A_ROW = 20
MAX_NAMED_IMAGES = 3  # in a message


@dataclass(frozen=True)
class _Step:
    """The meaning of a step's flags: each method's loss at each level, the YOLO loss, then gradients, at `places`.

    strides: of the levels. images: the batch's files. teacher: (L, B) bool, whether the teacher's map of a level is
    finite for an image; stays on the device, and is read only for a message.
    """

    strides: Sequence[int] = ()
    teacher: Tensor | None = None
    places: Sequence[str] = ()
    images: Sequence[str] = ()


class NonFiniteGuard:
    """Keeps losses and gradients that are not finite away from the student, and reports where they came from.

    Both become 0 on the device. Their flags are read one step late, so that the host does not wait for a GPU.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.dropped = 0  # steps of this epoch without distillation, or skipped by the gradient scaler
        self.overflowed: Tensor | None = None  # whether a gradient was dropped since the last optimizer step
        self._steps_in_a_row = 0
        self._skipped_in_a_row = 0
        self._warned = False
        self._batches_per_step = 1
        self._loss_flags: Tensor | None = None  # (M · L + 1,) of the present step: whether a loss was not finite
        self._gradient_flags: list[tuple[str, Tensor]] = []  # (place, whether a gradient was not finite)
        self._step = _Step()
        self._flags: LateFlags[_Step] = LateFlags()
        self._skip_flags: LateFlags[Sequence[str]] = LateFlags()

    def guard_losses(self, losses: Tensor, task: Tensor, levels: Sequence[Level], images: Sequence[str]) -> Tensor:
        """Return the (M, L) losses, all 0 if one of them is not finite. task: the YOLO loss. images: the batch's files.

        If the YOLO loss is not finite either, the student itself is broken: Ultralytics recovers it after the epoch, so
        such a step is none of those in a row that end the training.
        """
        broken = ~torch.isfinite(losses.detach())
        # A sum is finite if all values are; of all reductions it costs least.
        sums = [level.teacher.sum((1, 2, 3), dtype=torch.float32) for level in levels]
        teacher = torch.isfinite(torch.stack(sums))
        self._loss_flags = torch.cat([broken.flatten(), ~torch.isfinite(task.detach()).all().reshape(1)])
        self._step = _Step([level.stride for level in levels], teacher, images=images)
        return torch.where(self._loss_flags.any(), 0, losses)

    def guard_gradient(self, maps: Tensor, stride: int) -> Tensor:
        """Return the maps with a hook: a gradient through them that is not finite becomes 0."""
        if not maps.requires_grad:
            return maps
        guarded = maps.view_as(maps)
        self._zero_if_broken(guarded, f" at {level_name(stride)}")
        return guarded

    def guard_adapter(self, parameter: nn.Parameter) -> None:
        """Let a gradient of an adapter that is not finite become 0, before processes average their gradients."""
        self._zero_if_broken(parameter, ", in an adapter")

    def _zero_if_broken(self, tensor: Tensor, place: str) -> None:
        # The tensor's own memory format: with another one the student's backward would choose other kernels.
        layout = torch.contiguous_format if tensor.is_contiguous() else torch.channels_last

        def check(gradient: Tensor) -> Tensor:
            finite = torch.isfinite(gradient).all()
            self._gradient_flags.append((place, ~finite))
            return torch.where(finite, gradient, 0).contiguous(memory_format=layout)

        tensor.register_hook(check)  # type: ignore[no-untyped-call]

    def after_backward(self, batches_per_step: int = 1) -> None:
        """Count the step before this one if its losses or gradients were not finite.

        batches_per_step: of the optimizer. Raises UserError after MAX_STEPS_IN_A_ROW such steps in a row; if gradients
        were not finite, as many steps of the optimizer: a gradient scaler lowers its scale in these alone.
        """
        self._batches_per_step = batches_per_step
        losses, gradients, step = self._loss_flags, self._gradient_flags, self._step
        self.discard()
        if losses is None:  # no distillation in this step
            return
        flags = losses
        if gradients:
            places, broken = zip(*gradients, strict=True)
            step = replace(step, places=places)
            flags = torch.cat([losses, torch.stack(broken)])
            overflowed = flags[len(losses) :].any() & ~losses.any()
            self.overflowed = overflowed if self.overflowed is None else self.overflowed | overflowed
        self._count(self._flags.exchange(flags, step))

    def _count(self, late: tuple[list[bool], _Step] | None) -> None:
        if late is None:
            return
        flags, step = late
        if not any(flags):
            self._steps_in_a_row = 0
            return
        index, levels = flags.index(True), len(step.strides)
        task = len(self._names) * levels  # the index of the YOLO loss's flag
        gradient = index - task - 1
        if flags[task]:
            self.dropped += 1
            self._warn(f"the YOLO loss is not finite (images {_names(step.images)}); no distillation in this step")
            return
        if gradient >= 0:
            what = f"a gradient of {' or '.join(self._names)}{step.places[gradient]}"
            self._drop(what, step.images, "it counts as 0 in this step", MAX_STEPS_IN_A_ROW * self._batches_per_step)
            return
        method, level = divmod(index, levels)
        finite = step.teacher[level].tolist() if step.teacher is not None else []
        broken_images = [image for image, is_finite in zip(step.images, finite, strict=False) if not is_finite]
        what = f"{self._names[method]}'s loss at {level_name(step.strides[level])}"
        self._drop(what, broken_images or step.images, "this step trains without distillation")

    def after_step(self, gradient_norm: Tensor) -> None:
        """Count a step that a gradient scaler skips, because the student's gradient is not finite.

        Raises UserError after MAX_SKIPPED_IN_A_ROW of them.
        """
        self._count_skip(self._skip_flags.exchange(~torch.isfinite(gradient_norm).reshape(1), self._step.images))

    def _count_skip(self, late: tuple[list[bool], Sequence[str]] | None) -> None:
        if late is None:
            return
        (skipped,), images = late
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if skipped else 0
        if not skipped:
            return
        self.dropped += 1
        what = "the student's gradient"
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            problem = f"{what} is not finite for {self._skipped_in_a_row} steps in a row (images {_names(images)})"
            raise UserError("amp", problem, "try amp=False, amp=bf16, or a smaller lr0")
        self._warn(f"{what} is not finite (images {_names(images)}); the gradient scaler skips the step")

    def discard(self) -> None:
        """Discard the flags of a step that ends here, or of gradients that were measured and not used."""
        self._loss_flags, self._gradient_flags = None, []

    def _drop(self, what: str, images: Sequence[str], consequence: str, limit: int = MAX_STEPS_IN_A_ROW) -> None:
        self.dropped += 1
        self._steps_in_a_row += 1
        problem = f"{what} is not finite"
        if self._steps_in_a_row >= limit:
            problem += f" for {self._steps_in_a_row} steps in a row (images {_names(images)})"
            raise UserError("method", problem, "try teacher_precision=fp32, a smaller balance or gain, or amp=False")
        self._warn(f"{problem} (images {_names(images)}); {consequence}")

    def _warn(self, message: str) -> None:
        """Log a warning, once an epoch."""
        if not self._warned:
            LOGGER.warning(f"distillation: {message}")
            self._warned = True

    def end_epoch(self) -> int:
        """Return how many steps of the epoch had no distillation or were skipped by the gradient scaler; count anew."""
        self._count(self._flags.read())
        self._count_skip(self._skip_flags.read())
        dropped, self.dropped, self._warned = self.dropped, 0, False
        return dropped


def _names(images: Sequence[str]) -> str:
    names = ", ".join(Path(image).name for image in images[:MAX_NAMED_IMAGES])
    return f"{names} …" if len(images) > MAX_NAMED_IMAGES else names
