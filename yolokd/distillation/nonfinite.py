"""Losses and gradients that are not finite: drop them for a step, count them, and give up after ten in a row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolokd.errors import UserError
from yolokd.pyramid.level import Level, level_name

MAX_STEPS_IN_A_ROW = 10  # ours: after so many steps without distillation the training stops
MAX_NAMED_IMAGES = 3  # in a message


class NonFiniteGuard:
    """Keeps losses and gradients that are not finite away from the student, and reports where they came from.

    Turn it off (`active = False`) for gradients under a gradient scaler (float16): the scaler itself skips a step with
    infinite gradients, and lowers its scale.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.active = True  # whether gradients are watched
        self.dropped = 0  # steps of the present epoch
        self._steps_in_a_row = 0
        self._warned = False
        self._map_flags: list[tuple[int, Tensor]] = []  # (stride, whether a map's gradient was not finite)
        self._losses_were_finite = False  # of the present step
        self._images: Sequence[str] = ()

    def losses_finite(self, losses: Tensor, levels: Sequence[Level], images: Sequence[str]) -> bool:
        """Return whether all (M, L) losses are finite; count the step as dropped if not. images: the batch's files.

        Raises UserError at the tenth such step in a row (MAX_STEPS_IN_A_ROW).
        """
        self._images = images
        finite = torch.isfinite(losses.detach())
        self._losses_were_finite = bool(finite.all())
        if self._losses_were_finite:
            return True
        method, level = (~finite).nonzero()[0].tolist()
        teacher_is_finite = torch.isfinite(levels[level].teacher).flatten(1).all(1).tolist()
        broken_images = [image for image, is_finite in zip(images, teacher_is_finite, strict=False) if not is_finite]
        self._drop(f"{self._names[method]}'s loss at {level_name(levels[level].stride)}", broken_images or images)
        return False

    def guard_gradient(self, maps: Tensor, stride: int) -> Tensor:
        """Return the maps with a hook: a gradient through them that is not finite becomes 0."""
        if not self.active or not maps.requires_grad:
            return maps
        guarded = maps.view_as(maps)

        def check(gradient: Tensor) -> Tensor:
            finite = torch.isfinite(gradient).all()
            self._map_flags.append((stride, ~finite))
            return torch.where(finite, gradient, 0)

        guarded.register_hook(check)  # type: ignore[no-untyped-call]
        return guarded

    def after_backward(self, adapters: Sequence[Tensor]) -> None:
        """Set adapters' gradients that are not finite to 0, since clipping by the norm would spread them."""
        map_flags, self._map_flags = self._map_flags, []
        losses_were_finite, self._losses_were_finite = self._losses_were_finite, False
        gradients = [p.grad for p in adapters if p.grad is not None] if self.active else []
        flags = [flag for _, flag in map_flags] + [~torch.isfinite(gradient).all() for gradient in gradients]
        broken = torch.stack(flags).tolist() if flags else []  # in one read: reading a tensor makes a GPU wait
        for gradient, is_broken in zip(gradients, broken[len(map_flags) :], strict=True):
            if is_broken:
                gradient.zero_()
        if not losses_were_finite:  # counted already; gradients exist if another process had finite losses
            return
        if any(broken):
            strides = [stride for (stride, _), is_broken in zip(map_flags, broken, strict=False) if is_broken]
            where = f" at {level_name(strides[0])}" if strides else ", in an adapter"
            self._drop(f"a gradient of {' or '.join(self._names)}{where}", self._images)
        else:
            self._steps_in_a_row = 0

    def discard(self) -> None:
        """Discard the gradients seen since the last step: they were measured, not used."""
        self._map_flags = []

    def _drop(self, what: str, images: Sequence[str]) -> None:
        self.dropped += 1
        self._steps_in_a_row += 1
        names = ", ".join(Path(image).name for image in images[:MAX_NAMED_IMAGES])
        names += " …" if len(images) > MAX_NAMED_IMAGES else ""
        if self._steps_in_a_row >= MAX_STEPS_IN_A_ROW:
            raise UserError(
                "method",
                f"{what} is not finite for {self._steps_in_a_row} steps in a row (images {names})",
                "try teacher_precision=fp32, a smaller gain, or amp=False",
            )
        if not self._warned:
            LOGGER.warning(f"distillation: {what} is not finite (images {names}); the step trains without it")
            self._warned = True

    def end_epoch(self) -> int:
        """Return how many steps of the epoch had no distillation, and start counting anew."""
        dropped, self.dropped, self._warned = self.dropped, 0, False
        return dropped
