"""Blow-ups: what is not finite in the distillation is dropped for a step, counted, and after a while an error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolokd.errors import UserError
from yolokd.pyramid.level import Level, level_name

MAX_STEPS_IN_A_ROW = 10  # ours: steps without distillation after which something is broken for good
MAX_NAMED_IMAGES = 3  # images that a message names


class NonFiniteGuard:
    """Keeps losses and gradients that are not finite from the student, and says where they came from.

    Under a gradient scaler (float16) infinite gradients are its business: it skips the step and lowers its scale.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self.active = True  # whether gradients are watched
        self.dropped = 0  # steps of the present epoch
        self._row = 0
        self._warned = False
        self._bad: list[tuple[int, Tensor]] = []  # by stride, whether a gradient of this step was not finite
        self._admitted = False  # whether the step's losses were
        self._images: Sequence[str] = ()

    def losses_finite(self, losses: Tensor, levels: Sequence[Level], images: Sequence[str]) -> bool:
        """Whether all of (M, L) losses are finite; counts the step as dropped if not. images: the batch's files.

        Raises UserError after MAX_STEPS_IN_A_ROW steps.
        """
        self._images = images
        finite = torch.isfinite(losses.detach())
        self._admitted = bool(finite.all())
        if self._admitted:
            return True
        method, level = (~finite).nonzero()[0].tolist()
        fine = torch.isfinite(levels[level].teacher).flatten(1).all(1).tolist()
        guilty = [image for image, sound in zip(images, fine, strict=False) if not sound]
        self._drop(f"{self._names[method]}'s loss at {level_name(levels[level].stride)}", guilty or images)
        return False

    def guard_gradient(self, maps: Tensor, stride: int) -> Tensor:
        """The same maps; a gradient that comes back through them and is not finite becomes 0."""
        if not self.active or not maps.requires_grad:
            return maps
        seen = maps.view_as(maps)

        def check(gradient: Tensor) -> Tensor:
            fine = torch.isfinite(gradient).all()
            self._bad.append((stride, ~fine))
            return torch.where(fine, gradient, 0)

        seen.register_hook(check)  # type: ignore[no-untyped-call]
        return seen

    def after_backward(self, adapters: Sequence[Tensor]) -> None:
        """Drop the adapters' gradients that are not finite, before clipping spreads them."""
        bad, self._bad = self._bad, []
        admitted, self._admitted = self._admitted, False
        gradients = [p.grad for p in adapters if p.grad is not None] if self.active else []
        flags = [flag for _, flag in bad] + [~torch.isfinite(g).all() for g in gradients]
        found = torch.stack(flags).tolist() if flags else []  # at once: reading a tensor makes a GPU wait
        strides = [stride for (stride, _), broken in zip(bad, found, strict=False) if broken]
        for gradient, broken in zip(gradients, found[len(bad) :], strict=True):
            if broken:
                gradient.zero_()
        if not admitted:  # counted already; gradients are there all the same where another process did admit
            return
        if any(found):
            where = f" at {level_name(strides[0])}" if strides else ", in an adapter"
            self._drop(f"a gradient of {' or '.join(self._names)}{where}", self._images)
        else:
            self._row = 0

    def forget(self) -> None:
        """Leave out what gradients were looked at since: they were measured, not used."""
        self._bad = []

    def _drop(self, what: str, images: Sequence[str]) -> None:
        self.dropped += 1
        self._row += 1
        names = ", ".join(Path(i).name for i in images[:MAX_NAMED_IMAGES]) + (
            " …" if len(images) > MAX_NAMED_IMAGES else ""
        )
        if self._row >= MAX_STEPS_IN_A_ROW:
            raise UserError(
                "method",
                f"{what} is not finite for {self._row} steps in a row (images {names})",
                "try teacher_precision=fp32, a smaller gain, or amp=False",
            )
        if not self._warned:
            LOGGER.warning(f"distillation: {what} is not finite (images {names}); the step trains without it")
            self._warned = True

    def end_epoch(self) -> int:
        """How many steps of the epoch went without distillation; begins the next."""
        dropped, self.dropped, self._warned = self.dropped, 0, False
        return dropped
