"""One pyramid level: its shape, its maps of a batch, and operations on maps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from math import log2

import torch
import torch.nn.functional as F
from torch import Tensor

from yolokd.pyramid.boxes import Labels, inverse_areas


@dataclass(frozen=True)
class LevelShape:
    """One paired level: its stride in pixels, and the channels of both models' maps there.

    stage: which of several teachers it belongs to, counted from 0, the weakest.
    """

    stride: int
    student_channels: int
    teacher_channels: int
    stage: int = 0


@dataclass(eq=False)
class Level:
    """One stride's maps of a batch, on the student's grid.

    student: (B, C_S, H, W), carries gradient. teacher: (B, C_T, H, W), no gradient.
    student_logits, teacher_logits: (B, K, H, W) logits of the K shared classes, or None where no method wants them.
    teacher_mean_logits: the mean of the logits of an end-to-end teacher's two branches; of others the logits; or None.
    student_boxes, teacher_boxes: (B, 4, H, W) predicted distances left, top, right, bottom, in cells, or None.
    labels: the batch's boxes. seed: for what a method draws in this step; the same when a resumed run does it again.
    """

    stride: int
    student: Tensor
    teacher: Tensor
    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_mean_logits: Tensor | None = None
    student_boxes: Tensor | None = None
    teacher_boxes: Tensor | None = None
    labels: Labels | None = None
    seed: int = 0
    _computed: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, computed for the first of the methods that ask for `key` and shared by the others."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def inverse_areas(self) -> Tensor:
        """`boxes.inverse_areas` of the labels on this level's grid: (B, H, W) float32."""
        labels = self.labels
        assert labels is not None
        b, _, h, w = self.student.shape
        return self.once("inverse areas", lambda: inverse_areas(labels, b, h, w))

    def uniform(self, *size: int) -> Tensor:
        """Random numbers in 0..1, float32, from the step's seed and not from torch's own stream."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.stride)) % 2**63)
        return torch.rand(*size, generator=generator).to(self.student.device)


def level_name(stride: int) -> str:
    """The field's name of a pyramid level.

    >>> level_name(8)
    'P3'
    """
    return f"P{round(log2(stride))}"


def resize_to(reference: Tensor, maps: Tensor) -> Tensor:
    """Resample `maps` (B, C, h, w) bilinearly to the grid of `reference` (B, *, H, W); untouched where equal."""
    if maps.shape[-2:] == reference.shape[-2:]:
        return maps
    return F.interpolate(maps.float(), size=reference.shape[-2:], mode="bilinear", align_corners=False).to(maps.dtype)


def split_levels(flat: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Cut a head's (B, C, anchors) output into one (B, C, H, W) per map."""
    sizes = [m.shape[-2] * m.shape[-1] for m in maps]
    parts = torch.split(flat, sizes, dim=-1)
    return [p.view(*p.shape[:2], *m.shape[-2:]) for p, m in zip(parts, maps, strict=True)]


def confidence_shares(logits: Sequence[Tensor]) -> Tensor:
    """(L,) share of each level in the teacher's confidence: the sum over positions of its top class probability."""
    sums = torch.stack([t.float().amax(1).sigmoid().sum() for t in logits])
    return sums / sums.sum()
