"""Measures, level by level, how hard the YOLO loss and each method pull at the student's neck."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan

import torch
from torch import Tensor

from yolokd.pyramid.level import level_name

LEVEL_FIELDS = ("share", "task_grad")  # whichever methods are at work
FLOAT16_SCALE = 2.0**10  # float16 gradients are measured at this scale: they would underflow


class GradientRecorder:
    """Collects measurements between two `means()`.

    A total over levels hides the balance: one level can dominate it by orders of magnitude.
    """

    def __init__(self, names: Sequence[str], strides: Sequence[int]) -> None:
        self._names = names
        whats = [*LEVEL_FIELDS, *(f"{name}_{what}" for what in ("grad", "ratio", "gain") for name in names)]
        self._empty = {f"{level_name(stride)}/{what}": nan for stride in strides for what in whats}
        self._records: list[dict[str, float]] = []
        self.last: dict[str, float] = self._empty  # what `means` gave last; a resume restores it

    def record(self, strides: Sequence[int], task: Tensor, pull: Tensor, gains: Tensor, share: Tensor) -> None:
        """Keep a measurement: norms (L,) and, unscaled, (M, L); gains in force, (M, L); the teacher's confidence, (L,).

        The ratio of a method is that of its gradient in force to the YOLO loss's.
        """
        levels = [level_name(stride) for stride in strides]
        found = {f"{level}/share": v for level, v in zip(levels, share.tolist(), strict=True)}
        found |= {f"{level}/task_grad": v for level, v in zip(levels, task.tolist(), strict=True)}
        ratios = torch.where(task > 0, gains * pull / task, 0.0)
        for what, values in (("grad", gains * pull), ("ratio", ratios), ("gain", gains)):
            for name, row in zip(self._names, values.tolist(), strict=True):
                found |= {f"{level}/{name}_{what}": v for level, v in zip(levels, row, strict=True)}
        self._records.append(self._empty | found)

    def rest(self) -> None:
        """Say that nothing is distilled any more: what methods pull and gain is 0, not what was measured last."""
        if not self._records:
            self.last = {k: v if k.endswith(LEVEL_FIELDS) or isnan(v) else 0.0 for k, v in self.last.items()}

    def forget(self) -> None:
        """Drop what was measured since the last means: the epoch is done again."""
        self._records = []

    def means(self) -> dict[str, float]:
        """The means since the last call; those of the last call where nothing was measured since."""
        if self._records:
            self.last = {k: sum(r[k] for r in self._records) / len(self._records) for k in self._records[0]}
            self._records = []
        return self.last


def gradient_norms(loss: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """(L,) float32 norms of a loss's gradient at the student's neck maps; 0 where none flows, as below a frozen layer.

    One backward from the loss to the finest map, through the head and the maps that are computed from it.
    """
    live = [m for m in maps if m.requires_grad]
    norms = torch.zeros(len(maps), device=loss.device)
    if not live or not loss.requires_grad:
        return norms
    scale = FLOAT16_SCALE if any(m.dtype == torch.float16 for m in live) else 1.0
    found = iter(torch.autograd.grad(loss.sum() * scale, live, retain_graph=True, allow_unused=True))
    for i, m in enumerate(maps):
        gradient = next(found) if m.requires_grad else None
        if gradient is not None:
            norms[i] = gradient.float().norm() / scale
    return norms


def per_level_gradient_norms(losses: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """(L,) the same of each level's own loss at its own map.

    Coarser maps are computed from finer ones: the gradient of all levels' losses at a finer one would tell of theirs,
    at other gains than those that are in force.
    """
    return torch.cat([gradient_norms(loss, [m]) for loss, m in zip(losses, maps, strict=True)])
