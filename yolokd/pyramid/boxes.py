"""Boxes on a level's grid: which cells the labels cover, and how far two heads' predictions overlap."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE_TOLERANCE = 1e-4  # ours, in cells: labels have six digits, and half a box is added and taken away in float32


@dataclass(frozen=True, eq=False)
class Labels:
    """The labelled boxes of a batch.

    image: (N,) index of each box's image. corners: (N, 4) x1, y1, x2, y2 as shares of the image's width and height.
    """

    image: Tensor
    corners: Tensor

    @staticmethod
    def from_centers(image: Tensor, boxes: Tensor) -> Labels:
        """From (N, 4) centers and sizes, as YOLO labels hold them."""
        center, half = boxes[:, :2].float(), boxes[:, 2:].float() / 2
        return Labels(image.flatten().long(), torch.cat([center - half, center + half], 1))

    def to(self, device: torch.device) -> Labels:
        """On a device."""
        return Labels(self.image.to(device), self.corners.to(device))


def inverse_areas(labels: Labels, images: int, height: int, width: int) -> Tensor:
    """(images, height, width) float32: one over the area, in cells, of the smallest box over a cell; 0 where none is.

    A box covers every cell that it touches by more than ON_EDGE; one without area covers none. No loop over boxes;
    time and memory grow with the cells covered, counted once for each box.
    """
    grid = labels.corners.new_tensor([width, height])
    corners = (labels.corners * grid.repeat(2)).nan_to_num()
    low = (corners[:, :2].clamp(min=0) + EDGE_TOLERANCE).floor()
    high = torch.minimum(torch.maximum((corners[:, 2:] - EDGE_TOLERANCE).ceil(), low + 1), grid)
    real = torch.isfinite(labels.corners).all(1) & (corners[:, 2:] > corners[:, :2]).all(1)
    columns, rows = ((high - low).clamp(min=0) * real[:, None]).long().unbind(1)
    area = columns * rows
    box = torch.repeat_interleave(area)  # for each covered cell, the box that covers it
    within = torch.arange(len(box), device=box.device) - (area.cumsum(0) - area)[box]
    first = (labels.image * height + low[:, 1].long()) * width + low[:, 0].long()
    cell = first[box] + within + within // columns[box] * (width - columns)[box]
    value = (1 / area.to(corners.dtype))[box]
    found = corners.new_zeros(images * height * width).scatter_reduce_(0, cell, value, "amax")
    return found.view(images, height, width)


def decoded(raw: Tensor, bins: int) -> Tensor:
    """(B, 4·bins, H, W) of a YOLO head -> (B, 4, H, W) float32: distances left, top, right, bottom, in cells.

    Several bins are a distribution over whole cells, of which this is the mean; a single one is the distance itself.
    """
    b, _, h, w = raw.shape
    if bins == 1:
        return raw.float()
    weights = torch.arange(bins, device=raw.device, dtype=torch.float32)[:, None, None]
    return (raw.float().view(b, 4, bins, h, w).softmax(2) * weights).sum(2)  # no product that autocast would round


def resize_distances(reference: Tensor, distances: Tensor) -> Tensor:
    """Resample (B, 4, h, w) distances in cells to the grid of `reference` (B, *, H, W), and count in its cells."""
    height, width = reference.shape[-2:]
    if distances.shape[-2:] == (height, width):
        return distances
    ratio = distances.new_tensor([width / distances.shape[-1], height / distances.shape[-2]]).repeat(2)
    resized = F.interpolate(distances, size=(height, width), mode="bilinear", align_corners=False)
    return resized * ratio[:, None, None]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of two boxes at each position: two (B, 4, H, W) of distances from the same point -> (B, H, W) in 0..1."""
    sides = (torch.minimum(a, b)[:, :2] + torch.minimum(a, b)[:, 2:]).clamp(min=0)
    common = sides[:, 0] * sides[:, 1]
    area_a, area_b = (((x[:, :2] + x[:, 2:]).clamp(min=0)).prod(1) for x in (a, b))
    union = area_a + area_b - common
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)
