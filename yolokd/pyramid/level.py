"""A pyramid level: its shape, its maps of one batch, and operations on maps."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, fields, replace
from math import log2
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from yolokd.pyramid.boxes import Labels, inverse_areas
from yolokd.pyramid.head import Head, HeadShape

Share = TypeVar("Share", float, Tensor)


@dataclass(frozen=True)
class LevelShape:
    """The shape of one level that both models have.

    stride: in pixels of the image. student_channels, teacher_channels: of the models' maps. stage: the number of the
    teacher's stage, from 0; 0 for all teachers of an ensemble. strides: of all the student's levels, finest first.
    student_head, teacher_head: None if the model has no head that predicts at every position.
    """

    stride: int
    student_channels: int
    teacher_channels: int
    stage: int = 0
    strides: tuple[int, ...] = ()
    student_head: HeadShape | None = None
    teacher_head: HeadShape | None = None


@dataclass(eq=False)
class Level:
    """The maps and predictions of both models at one level, for one batch; all on the student's grid.

    student: (B, C_S, H, W) map, carries gradient. teacher: (B, C_T, H, W) map, no gradient.
    student_logits, teacher_logits: (B, K, H, W) logits of the K shared classes, or None if no method wants them; of an
    end-to-end student, those of its one-to-many head.
    teacher_mean_logits: (B, K, H, W), the mean of the logits of an end-to-end teacher's two branches, for any other
    teacher its logits, or None.
    student_boxes, teacher_boxes: (B, 4, H, W) predicted distances left, top, right, bottom, in cells, or None.
    labels: the batch's labelled boxes, on the CPU. seed: of the random numbers of this step and process; a resumed run
    has the same seed there.
    student_box_logits, teacher_box_logits: (B, 4, bins, H, W) raw box outputs of the heads, from which these distances
    are decoded, or None; of an end-to-end student, those of its one-to-many head.
    assigned: (B, H, W) bool, the positions that the YOLO loss of this step assigned to labelled objects, or None; of an
    end-to-end student, by its one-to-many loss.
    head_maps: {depth: two (B, C, H, W) maps, of boxes and of classes, that entered the layer of this number in the two
    branches of the student's head}, for the depths that methods want; of an end-to-end student, of its one-to-many one.
    teacher_head: the teacher's frozen head, in float32, whose class logits are those of the shared classes, or None.
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
    student_box_logits: Tensor | None = None
    teacher_box_logits: Tensor | None = None
    assigned: Tensor | None = None
    teacher_head: Head | None = None
    head_maps: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _computed: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)

    def compute_once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Return the tensor stored under `key`; the first call computes and stores it, so that methods can share it."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def first(self, images: int) -> Level:
        """Return the level of the first `images` images of the batch."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        cut: dict[str, Any] = {k: value[:images] for k, value in values.items() if isinstance(value, Tensor)}
        head_maps = {depth: (boxes[:images], classes[:images]) for depth, (boxes, classes) in self.head_maps.items()}
        return replace(self, **cut, head_maps=head_maps)

    def inverse_areas(self) -> Tensor:
        """Return `boxes.inverse_areas` of the labels on this level's grid, (B, H, W) float32."""
        labels = self.labels
        assert labels is not None
        b, _, h, w = self.student.shape
        return self.compute_once("inverse areas", lambda: inverse_areas(labels, b, h, w, self.student.device))

    def draw_uniform(self, *size: int) -> Tensor:
        """Return float32 random numbers in 0..1, drawn with the step's seed and not from torch's global generator."""
        device = self.student.device
        generator = torch.Generator(device).manual_seed(hash((self.seed, self.stride)) % 2**63)
        return torch.rand(*size, generator=generator, device=device)


def level_name(stride: int) -> str:
    """Return the usual name of the pyramid level of a stride in pixels.

    >>> level_name(8)
    'P3'
    """
    return f"P{round(log2(stride))}"


def resize_to(reference: Tensor, maps: Tensor) -> Tensor:
    """Return `maps` (B, C, h, w) on the grid of `reference` (B, *, H, W), resampled bilinearly if the grids differ."""
    if maps.shape[-2:] == reference.shape[-2:]:
        return maps
    return F.interpolate(maps.float(), size=reference.shape[-2:], mode="bilinear", align_corners=False).to(maps.dtype)


def split_levels(flat: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Return a head's output (B, C, anchors), split by level: one (B, C, H, W) for each (B, *, H, W) in `maps`."""
    sizes = [m.shape[-2] * m.shape[-1] for m in maps]
    parts = torch.split(flat, sizes, dim=-1)
    return [p.view(*p.shape[:2], *m.shape[-2:]) for p, m in zip(parts, maps, strict=True)]


def confidence_shares(logits: Sequence[Tensor]) -> Tensor:
    """Return (L,) shares of the levels in the teacher's confidence, float32; their sum is 1.

    logits: (B, K, H, W) for each of the L levels. A level's confidence is the sum over batch and positions of the top
    class probability.
    """
    sums = torch.stack([t.float().amax(1).sigmoid().sum() for t in logits])
    return sums / sums.sum()


def floored(share: Share, floor: float, levels: int) -> Share:
    """Return the weight of a level among `levels`, (1 − floor) · share + floor / levels, for one share or for several.

    >>> [round(floored(share, 0.3, 3), 4) for share in (0.9999, 0.0001, 0.0)]
    [0.7999, 0.1001, 0.1]
    """
    return (1 - floor) * share + floor / levels
