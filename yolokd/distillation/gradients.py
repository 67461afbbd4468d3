"""Gradient norms of the YOLO loss and of each method at the student's neck maps, measured level by level."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan, nan

import torch
from torch import Tensor

from yolokd.pyramid.level import level_name

LEVEL_FIELDS = ("share", "task_grad")  # of each level; the other columns are of each level and method
FLOAT16_SCALE = 2.0**10  # ours: the loss is multiplied by this when gradients are float16, or they would underflow


class GradientRecorder:
    """Collects measurements of gradients, and averages them over an epoch, for results.csv and the log.

    Each level has columns of its own, since one level can dominate a total by orders of magnitude.

    names: of the methods. strides: of all levels, in pixels.
    """

    def __init__(self, names: Sequence[str], strides: Sequence[int]) -> None:
        self._names = names
        fields = [*LEVEL_FIELDS, *(f"{name}_{quantity}" for quantity in ("grad", "ratio", "gain") for name in names)]
        self._empty = {f"{level_name(stride)}/{field}": nan for stride in strides for field in fields}
        self._records: list[dict[str, float]] = []
        self.last: dict[str, float] = self._empty  # the last result of `means`; a resume restores it

    def record(self, strides: Sequence[int], task: Tensor, pull: Tensor, gains: Tensor, share: Tensor) -> None:
        """Add one measurement at L levels of M methods.

        task: (L,) norms of the YOLO loss's gradient. pull: (M, L) norms of the methods' gradients, before any gain.
        gains: (M, L) in force. share: (L,) the levels' shares of the teacher's confidence.
        A method's ratio is the norm of its gradient, its gain included, over that of the YOLO loss. Where several
        teachers teach at a stride, it comes several times among `strides`, and all but the YOLO loss's norm is summed.
        """
        levels = [level_name(stride) for stride in strides]
        record = {f"{level}/task_grad": v for level, v in zip(levels, task.tolist(), strict=True)}
        ratios = torch.where(task > 0, gains * pull / task, 0.0)
        rows = {"share": share.tolist()}
        for quantity, values in (("grad", gains * pull), ("ratio", ratios), ("gain", gains)):
            rows |= {f"{name}_{quantity}": row for name, row in zip(self._names, values.tolist(), strict=True)}
        for field, row in rows.items():
            for level, value in zip(levels, row, strict=True):
                record[f"{level}/{field}"] = record.get(f"{level}/{field}", 0.0) + value
        self._records.append(self._empty | record)

    def record_idle(self) -> None:
        """Set the methods' columns of the last means to 0, since distillation is off.

        Measurements that `means()` has not averaged yet still count first.
        """
        if not self._records:
            self.last = {k: v if k.endswith(LEVEL_FIELDS) or isnan(v) else 0.0 for k, v in self.last.items()}

    def discard(self) -> None:
        """Drop the measurements since the last `means()`, because the epoch is repeated."""
        self._records = []

    def means(self) -> dict[str, float]:
        """Return the means since the last call, by column; without a new measurement, the last result."""
        if self._records:
            self.last = {k: sum(r[k] for r in self._records) / len(self._records) for k in self._records[0]}
            self._records = []
        return self.last


def gradient_norms(loss: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """Return (L,) float32 norms of a loss's gradient at the L student's neck maps; 0 where no gradient flows.

    No gradient flows to a map whose layers are frozen, for example. The cost is one backward pass from the loss to the
    finest map, through the head and through the maps that are computed from the finest.
    """
    live = [m for m in maps if m.requires_grad]
    norms = torch.zeros(len(maps), device=loss.device)
    if not live or not loss.requires_grad:
        return norms
    scale = FLOAT16_SCALE if any(m.dtype == torch.float16 for m in live) else 1.0
    gradients = iter(torch.autograd.grad(loss.sum() * scale, live, retain_graph=True, allow_unused=True))
    for i, m in enumerate(maps):
        gradient = next(gradients) if m.requires_grad else None
        if gradient is not None:
            norms[i] = gradient.float().norm() / scale
    return norms


def per_level_gradient_norms(losses: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """Return (L,) float32 norms: for each of L levels, of its own loss's gradient at its own map.

    Coarser maps are computed from finer ones. So the gradient of all levels' losses at a finer map would include those
    of coarser levels, and with other gains than those in force.
    """
    return torch.cat([gradient_norms(loss, [m]) for loss, m in zip(losses, maps, strict=True)])
