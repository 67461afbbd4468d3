"""Measures, level by level, how hard the YOLO loss and each method pull at the student's neck."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log2

import torch
from torch import Tensor

from yolokd.pyramid import Level


class Probe:
    """Collects measurements between two `means()`; norms are of gradients in force, gains and level weights included.

    A total over levels hides the balance: one level can dominate it by orders of magnitude.
    """

    def __init__(self) -> None:
        self._records: list[dict[str, float]] = []
        self.last: dict[str, float] = {}  # what `means` gave last; a resume restores it

    def measure(self, task: Tensor, methods: Mapping[str, Tensor], levels: Sequence[Level], share: Tensor) -> None:
        """Take both gradients at the student's neck maps: one extra backward through the head, no further."""
        maps = [level.student for level in levels]
        pull = _norms(task, maps)
        record: dict[str, float] = {}
        for i, level in enumerate(levels):
            record |= {
                f"{level_name(level.stride)}/share": float(share[i]),
                f"{level_name(level.stride)}/task_grad": pull[i],
            }
        for name, loss in methods.items():
            for level, task_norm, norm in zip(levels, pull, _norms(loss, maps), strict=True):
                key = f"{level_name(level.stride)}/{name}"
                record |= {f"{key}_grad": norm, f"{key}_ratio": norm / task_norm if task_norm else 0.0}
        self._records.append(record)

    def forget(self) -> None:
        """Drop what was measured since the last means: the epoch is done again."""
        self._records = []

    def means(self) -> dict[str, float]:
        """The means since the last call; those of the last call where nothing was measured since."""
        if self._records:
            self.last = {k: sum(r[k] for r in self._records) / len(self._records) for k in self._records[0]}
            self._records = []
        return self.last


def level_name(stride: int) -> str:
    """The field's name of a pyramid level.

    >>> level_name(8)
    'P3'
    """
    return f"P{round(log2(stride))}"


def _norms(loss: Tensor, maps: Sequence[Tensor]) -> list[float]:
    """Gradient norms at the maps; 0 where nothing flows, as below a frozen layer."""
    live = [m for m in maps if m.requires_grad]
    if not live or not loss.requires_grad:
        return [0.0 for _ in maps]
    grads = iter(torch.autograd.grad(loss.sum(), live, retain_graph=True, allow_unused=True))
    found = [next(grads) if m.requires_grad else None for m in maps]
    return [0.0 if g is None else float(g.float().norm()) for g in found]
