"""Boxes on a level's grid: the cells that labels cover, and the overlap of two heads' predicted boxes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE_TOLERANCE = 1e-4  # ours, in cells: allows for labels of six digits, and for float32 rounding of center ± size / 2


@dataclass(frozen=True, eq=False)
class Labels:
    """The N labelled boxes of a batch.

    image: (N,) int64, the index of each box's image in the batch. corners: (N, 4) float32 x1, y1, x2, y2, as fractions
    of the image's width and height.
    """

    image: Tensor
    corners: Tensor

    @staticmethod
    def from_centers(image: Tensor, boxes: Tensor) -> Labels:
        """Return Labels of YOLO's boxes: (N, 4) center x, y, width, height, as fractions; image: (N,) or (N, 1)."""
        center, half = boxes[:, :2].float(), boxes[:, 2:].float() / 2
        return Labels(image.flatten().long(), torch.cat([center - half, center + half], 1))

    def to(self, device: torch.device) -> Labels:
        """Return the labels on a device."""
        return Labels(self.image.to(device), self.corners.to(device))


def inverse_areas(labels: Labels, images: int, height: int, width: int) -> Tensor:
    """Return one over the area, in cells, of the smallest box over each cell; 0 where there is no box.

    Shape: (images, height, width) float32, on a grid of height x width cells for each of `images` images. A box covers
    every cell that it touches by more than EDGE_TOLERANCE; a box without area covers none. There is no loop over boxes:
    time and memory grow with the number of covered cells, counted once for each box.
    """
    grid = labels.corners.new_tensor([width, height])
    corners = (labels.corners * grid.repeat(2)).nan_to_num()
    low = (corners[:, :2].clamp(min=0) + EDGE_TOLERANCE).floor()
    high = torch.minimum(torch.maximum((corners[:, 2:] - EDGE_TOLERANCE).ceil(), low + 1), grid)
    valid = torch.isfinite(labels.corners).all(1) & (corners[:, 2:] > corners[:, :2]).all(1)
    columns, rows = ((high - low).clamp(min=0) * valid[:, None]).long().unbind(1)
    area = columns * rows
    box = torch.repeat_interleave(area)  # for each covered cell, the box that covers it
    index_in_box = torch.arange(len(box), device=box.device) - (area.cumsum(0) - area)[box]
    first_cell = (labels.image * height + low[:, 1].long()) * width + low[:, 0].long()
    cell = first_cell[box] + index_in_box + index_in_box // columns[box] * (width - columns)[box]
    inverse_area = (1 / area.to(corners.dtype))[box]
    largest = corners.new_zeros(images * height * width).scatter_reduce_(0, cell, inverse_area, "amax")
    return largest.view(images, height, width)


def decode_distances(raw: Tensor, bins: int) -> Tensor:
    """Return the distances from each position to its box's sides: left, top, right, bottom, in cells.

    raw: (B, 4·bins, H, W), the box output of a YOLO head. Shape of the result: (B, 4, H, W) float32. Several bins are
    logits of a distribution over 0, 1, …, bins − 1 cells, whose mean is the distance; a single bin is the distance.
    """
    b, _, h, w = raw.shape
    if bins == 1:
        return raw.float()
    weights = torch.arange(bins, device=raw.device, dtype=torch.float32)[:, None, None]
    # A sum of products, because autocast would round a matrix product.
    return (raw.float().view(b, 4, bins, h, w).softmax(2) * weights).sum(2)


def resize_distances(reference: Tensor, distances: Tensor) -> Tensor:
    """Return distances resampled to another grid, and expressed in cells of that grid.

    distances: (B, 4, h, w), in cells of their own grid. reference: (B, *, H, W), whose grid is wanted. Shape of the
    result: (B, 4, H, W).
    """
    height, width = reference.shape[-2:]
    if distances.shape[-2:] == (height, width):
        return distances
    ratio = distances.new_tensor([width / distances.shape[-1], height / distances.shape[-2]]).repeat(2)
    resized = F.interpolate(distances, size=(height, width), mode="bilinear", align_corners=False)
    return resized * ratio[:, None, None]


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU, in 0..1, of two boxes at each position: two (B, 4, H, W) -> (B, H, W).

    a, b: distances left, top, right, bottom of both boxes, from the same point and in the same unit.
    """
    sides = (torch.minimum(a, b)[:, :2] + torch.minimum(a, b)[:, 2:]).clamp(min=0)
    common = sides[:, 0] * sides[:, 1]
    area_a, area_b = (((x[:, :2] + x[:, 2:]).clamp(min=0)).prod(1) for x in (a, b))
    union = area_a + area_b - common
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)
