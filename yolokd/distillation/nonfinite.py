"""Losses and gradients that are not finite: drop them for a step, count them, and give up after ten in a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolokd.errors import UserError
from yolokd.pyramid.level import Level, level_name
from yolokd.runtime.late import LateFlags

MAX_STEPS_IN_A_ROW = 10  # ours: after so many steps without distillation the training stops
# Ours: a gradient scaler starts at 2^16 and halves its scale at each step that it skips: so many halvings are enough.
MAX_SKIPPED_IN_A_ROW = 20
MAX_NAMED_IMAGES = 3  # in a message


@dataclass(frozen=True)
class _Step:
    """The facts about a step that a message names: where its gradients were watched, and the files of its images."""

    places: Sequence[str]
    images: Sequence[str]
    losses_were_finite: bool


class NonFiniteGuard:
    """Keeps losses and gradients that are not finite away from the student, and reports where they came from.

    Flags of gradients are read one step late, so that the host does not wait for a GPU in each step.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.dropped = 0  # steps of the present epoch
        self.overflowed: Tensor | None = None  # whether a gradient was dropped since the last optimizer step
        self._steps_in_a_row = 0
        self._skipped_in_a_row = 0
        self._warned = False
        self._map_flags: list[tuple[int, Tensor]] = []  # (stride, whether a map's gradient was not finite)
        self._losses_were_finite = False  # of the present step
        self._images: Sequence[str] = ()
        self._gradient_flags: LateFlags[_Step] = LateFlags()
        self._skip_flags: LateFlags[Sequence[str]] = LateFlags()

    def losses_finite(self, losses: Tensor, levels: Sequence[Level], images: Sequence[str]) -> bool:
        """Return whether all (M, L) losses are finite; count the step as dropped if not. images: the batch's files.

        Raises UserError at the tenth such step in a row (MAX_STEPS_IN_A_ROW).
        """
        self._images = images
        finite = torch.isfinite(losses.detach())
        self._losses_were_finite = bool(finite.all())
        if self._losses_were_finite:
            return True
        self._count_gradients(self._gradient_flags.read())  # of the step before this one
        method, level = (~finite).nonzero()[0].tolist()
        teacher_is_finite = torch.isfinite(levels[level].teacher).flatten(1).all(1).tolist()
        broken_images = [image for image, is_finite in zip(images, teacher_is_finite, strict=False) if not is_finite]
        self._drop(f"{self._names[method]}'s loss at {level_name(levels[level].stride)}", broken_images or images)
        return False

    def guard_gradient(self, maps: Tensor, stride: int) -> Tensor:
        """Return the maps with a hook: a gradient through them that is not finite becomes 0."""
        if not maps.requires_grad:
            return maps
        guarded = maps.view_as(maps)

        def check(gradient: Tensor) -> Tensor:
            finite = torch.isfinite(gradient).all()
            self._map_flags.append((stride, ~finite))
            return torch.where(finite, gradient, 0)

        guarded.register_hook(check)  # type: ignore[no-untyped-call]
        return guarded

    def after_backward(self, adapters: Sequence[Tensor]) -> None:
        """Set adapters' gradients that are not finite to 0, since clipping by the norm would spread them.

        Raises UserError at the tenth step in a row without distillation (MAX_STEPS_IN_A_ROW).
        """
        flags = [flag for _, flag in self._map_flags]
        places = [f" at {level_name(stride)}" for stride, _ in self._map_flags]
        for gradient in [p.grad for p in adapters if p.grad is not None]:
            broken = ~torch.isfinite(gradient).all()
            gradient.masked_fill_(broken, 0)
            flags.append(broken)
            places.append(", in an adapter")
        step = _Step(places, self._images, self._losses_were_finite)
        self._map_flags, self._losses_were_finite = [], False
        if flags:
            broken_gradients = torch.stack(flags)
            overflowed = broken_gradients.any()
            self.overflowed = overflowed if self.overflowed is None else self.overflowed | overflowed
            self._count_gradients(self._gradient_flags.exchange(broken_gradients, step))

    def _count_gradients(self, late: tuple[list[bool], _Step] | None) -> None:
        if late is None:
            return
        broken, step = late
        if not step.losses_were_finite:  # counted already; gradients exist if another process had finite losses
            return
        if any(broken):
            self._drop(f"a gradient of {' or '.join(self._names)}{step.places[broken.index(True)]}", step.images)
        else:
            self._steps_in_a_row = 0

    def after_step(self, gradient_norm: Tensor) -> None:
        """Count a step that a gradient scaler skips, because the student's gradient is not finite.

        Raises UserError after MAX_SKIPPED_IN_A_ROW of them.
        """
        self._count_skip(self._skip_flags.exchange(~torch.isfinite(gradient_norm).reshape(1), self._images))

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
        """Discard the gradients seen since the last step: they were measured, not used."""
        self._map_flags = []

    def _drop(self, what: str, images: Sequence[str]) -> None:
        self.dropped += 1
        self._steps_in_a_row += 1
        problem = f"{what} is not finite"
        if self._steps_in_a_row >= MAX_STEPS_IN_A_ROW:
            problem += f" for {self._steps_in_a_row} steps in a row (images {_names(images)})"
            raise UserError("method", problem, "try teacher_precision=fp32, a smaller gain, or amp=False")
        self._warn(f"{problem} (images {_names(images)}); the step trains without it")

    def _warn(self, message: str) -> None:
        """Log a warning, once an epoch."""
        if not self._warned:
            LOGGER.warning(f"distillation: {message}")
            self._warned = True

    def end_epoch(self) -> int:
        """Return how many steps of the epoch had no distillation, and start counting anew."""
        self._count_gradients(self._gradient_flags.read())
        self._count_skip(self._skip_flags.read())
        dropped, self.dropped, self._warned = self.dropped, 0, False
        return dropped


def _names(images: Sequence[str]) -> str:
    names = ", ".join(Path(image).name for image in images[:MAX_NAMED_IMAGES])
    return f"{names} …" if len(images) > MAX_NAMED_IMAGES else names
