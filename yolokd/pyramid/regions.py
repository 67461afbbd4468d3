"""Regions of a level around labelled boxes: LD's valuable localization region."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yolokd.pyramid.boxes import Labels, upload

ANCHOR_CELLS = 8  # the side of an anchor in cells, as in the released code of LD for GFL
CANDIDATES = 9  # anchors per box and level, as in ATSS (Zhang et al., CVPR 2020)


def valuable_region(
    labels: Labels, images: int, size: tuple[int, int], strides: Sequence[int], stride: int, gamma: float,
    device: torch.device | str = "cpu",
) -> Tensor:  # fmt: skip
    """Return the positions near labelled boxes that LD calls valuable, (images, H, W) bool, on the grid of one stride.

    Algorithm 1 of Zheng et al., CVPR 2022: the positions where γ·α_pos ≤ DIoU(anchor, box) ≤ α_pos for some box of the
    image. A position's anchor is the square of 8 cells around its center. α_pos is the box's threshold in ATSS: mean
    plus standard deviation of its IoU with the 9 anchors of each level whose centers are nearest.

    size: height and width of the images in pixels. strides: of all levels, in pixels. gamma: the paper's γ.
    The tensors' shapes follow from the number of boxes, which the CPU knows, so that it does not wait for a GPU.
    """
    height, width = size
    x, y = labels.corners[:, 0::2].float() * width, labels.corners[:, 1::2].float() * height
    boxes = upload(torch.stack([x, y], 2).flatten(1), device)
    if not len(boxes):
        return torch.zeros(images, height // stride, width // stride, dtype=torch.bool, device=boxes.device)
    usable = torch.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    boxes = boxes.where(usable[:, None], 0)
    upper = _atss_threshold(boxes, size, strides)[:, None, None]
    y, x = ((torch.arange(side // stride, device=boxes.device)[None] + 0.5) * stride for side in size)
    diou = _diou(boxes, y, x, ANCHOR_CELLS * stride)
    valuable = (diou >= gamma * upper) & (diou <= upper) & usable[:, None, None]
    counts = torch.zeros(images, *valuable.shape[1:], dtype=torch.int32, device=boxes.device)
    return counts.index_add_(0, upload(labels.image, device), valuable.int()) > 0


def _atss_threshold(boxes: Tensor, size: tuple[int, int], strides: Sequence[int]) -> Tensor:
    """Return α_pos of N boxes, (N,). boxes: (N, 4) in pixels."""
    center_y, center_x = (boxes[:, 1] + boxes[:, 3]) / 2, (boxes[:, 0] + boxes[:, 2]) / 2
    overlaps = []
    for stride in strides:
        y, x = (_nearest(center, side, stride) for center, side in zip((center_y, center_x), size, strict=True))
        distance = (y - center_y[:, None]).square()[:, :, None] + (x - center_x[:, None]).square()[:, None]
        distance = distance.flatten(1)
        nearest = distance.topk(min(CANDIDATES, distance.shape[1]), 1, largest=False).indices
        overlaps.append(_iou(boxes, y, x, ANCHOR_CELLS * stride).flatten(1).gather(1, nearest))
    candidates = torch.cat(overlaps, 1)
    return candidates.mean(1) + candidates.std(1, correction=min(1, candidates.shape[1] - 1))


def _nearest(center: Tensor, side: int, stride: int) -> Tensor:
    """Return where the 9 cells nearest to each of N points have their centers, along one axis, (N, 9) in pixels.

    side: of the image in pixels. The 9 nearest cells of the grid lie in the 9 nearest rows and columns.
    """
    cells = side // stride
    first = (center / stride).floor().long() - CANDIDATES // 2
    first = first.clamp(min=0).clamp(max=max(cells - CANDIDATES, 0))
    index = first[:, None] + torch.arange(min(CANDIDATES, cells), device=center.device)
    return (index + 0.5) * stride


def _iou(boxes: Tensor, y: Tensor, x: Tensor, anchor: float) -> Tensor:
    """Return the IoU of N boxes with square anchors, (N, H, W).

    boxes: (N, 4) in pixels. y, x: the centers of the anchors' rows, (N or 1, H), and columns, (N or 1, W). anchor:
    their side.
    """
    low, high = boxes[:, :2, None], boxes[:, 2:, None]
    width = (torch.minimum(high[:, 0], x + anchor / 2) - torch.maximum(low[:, 0], x - anchor / 2)).clamp(min=0)
    height = (torch.minimum(high[:, 1], y + anchor / 2) - torch.maximum(low[:, 1], y - anchor / 2)).clamp(min=0)
    common = height[:, :, None] * width[:, None]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)[:, None, None]
    return common / (area + anchor**2 - common)


def _diou(boxes: Tensor, y: Tensor, x: Tensor, anchor: float) -> Tensor:
    """Return the DIoU: the IoU minus the centers' squared distance over the squared diagonal around both."""
    low, high = boxes[:, :2, None], boxes[:, 2:, None]
    center = (low + high) / 2
    width = torch.maximum(high[:, 0], x + anchor / 2) - torch.minimum(low[:, 0], x - anchor / 2)
    height = torch.maximum(high[:, 1], y + anchor / 2) - torch.minimum(low[:, 1], y - anchor / 2)
    distance = (y - center[:, 1]).square()[:, :, None] + (x - center[:, 0]).square()[:, None]
    return _iou(boxes, y, x, anchor) - distance / (height.square()[:, :, None] + width.square()[:, None])
