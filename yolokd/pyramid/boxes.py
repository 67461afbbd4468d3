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
    of the image's width and height. Both are on the CPU: how many cells a box covers decides the shapes of tensors.
    """

    image: Tensor
    corners: Tensor

    @staticmethod
    def from_centers(image: Tensor, boxes: Tensor, height: int = 1, width: int = 1) -> Labels:
        """Return Labels of YOLO's boxes: (N, 4) center x, y, width, height, as fractions; image: (N,) or (N, 1).

        Of rotated boxes, (N, 5) with an angle in radians, they are the upright boxes around them. height, width: of the
        images, because a box is rotated in pixels.
        """
        center, half = boxes[:, :2].float(), boxes[:, 2:4].float() / 2
        if boxes.shape[1] == 5:
            pixels = half * (size := half.new_tensor([width, height]))
            cos, sin = boxes[:, 4:].float().cos().abs(), boxes[:, 4:].float().sin().abs()
            half = (pixels * cos + pixels.flip(1) * sin) / size
        return Labels(image.flatten().long(), torch.cat([center - half, center + half], 1))


def inverse_areas(labels: Labels, images: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return one over the area, in cells, of the smallest box over each cell; 0 where there is no box.

    Shape: (images, height, width) float32, on a grid of height x width cells for each of `images` images. A box covers
    every cell that it touches by more than EDGE_TOLERANCE; a box without area covers none. There is no loop over boxes:
    time and memory grow with the number of covered cells, counted once for each box. Boxes must lie in the image, at
    least in part, as Ultralytics' labels do.

    The CPU counts the cells of the boxes, and the device fills them in, so that the CPU does not wait for a GPU.
    """
    x1, y1, x2, y2 = labels.corners.unbind(1)
    valid = torch.isfinite(labels.corners).all(1) & (x2 * width > x1 * width) & (y2 * height > y1 * height)
    left, columns = _covered(x1 * width, x2 * width, width)
    top, rows = _covered(y1 * height, y2 * height, height)
    area = columns * rows * valid
    covered = sum(area.tolist())
    first_cell = (labels.image * height + top) * width + left
    area, columns, first_cell = upload(torch.stack([area, columns, first_cell]), device)
    box = torch.repeat_interleave(area, output_size=covered)  # for each covered cell, the box that covers it
    index_in_box = torch.arange(covered, device=device) - (area.cumsum(0) - area)[box]
    cell = first_cell[box] + index_in_box + index_in_box // columns[box] * (width - columns)[box]
    inverse_area = (1 / area.to(labels.corners.dtype))[box]
    largest = torch.zeros(images * height * width, dtype=inverse_area.dtype, device=device)
    return largest.scatter_reduce_(0, cell, inverse_area, "amax").view(images, height, width)


def _covered(low: Tensor, high: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Return the first cell and the number of cells that boxes cover along one axis of `cells` cells, (N,) int64."""
    first = (low.nan_to_num().clamp(min=0) + EDGE_TOLERANCE).floor()
    end = torch.maximum((high.nan_to_num() - EDGE_TOLERANCE).ceil(), first + 1).clamp(max=cells)
    return first.long(), (end - first).clamp(min=0).long()


def upload(values: Tensor, device: torch.device | str) -> Tensor:
    """Return a CPU tensor on a device, without waiting for the work that a GPU has queued."""
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def split_bins(raw: Tensor) -> Tensor:
    """Return the box output of a YOLO head by side and bin: (B, 4·bins, H, W) -> (B, 4, bins, H, W)."""
    b, channels, h, w = raw.shape
    return raw.reshape(b, 4, channels // 4, h, w)


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
    resized = F.interpolate(distances, size=(height, width), mode="bilinear", align_corners=False)
    horizontal = resized[:, 0::2] * (width / distances.shape[-1])
    vertical = resized[:, 1::2] * (height / distances.shape[-2])
    return torch.stack([horizontal, vertical], 2).flatten(1, 2)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the IoU, in 0..1, of two boxes at each position: two (B, 4, H, W) -> (B, H, W).

    a, b: distances left, top, right, bottom of both boxes, from the same point and in the same unit.
    """
    common, union = _common_and_union(a, b)
    return common / union.clamp(min=torch.finfo(union.dtype).tiny)


def giou(a: Tensor, b: Tensor) -> Tensor:
    """Return the GIoU, in -1..1, of two boxes at each position, given as for `iou`.

    Rezatofighi et al., CVPR 2019: IoU − (H − U) / H, with the areas U of the union and H of the box around both.
    """
    _, union = _common_and_union(a, b)
    hull = _area(torch.maximum(a, b))
    return iou(a, b) - (hull - union) / hull.clamp(min=torch.finfo(hull.dtype).tiny)


def _common_and_union(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    common = _area(torch.minimum(a, b))
    return common, _area(a) + _area(b) - common


def _area(distances: Tensor) -> Tensor:
    sides = (distances[:, :2] + distances[:, 2:]).clamp(min=0)
    return sides[:, 0] * sides[:, 1]


def box_divergence(student: Tensor, teacher: Tensor, tau: float) -> Tensor:
    """Return τ²·KL(softmax(z_T / τ) ‖ softmax(z_S / τ)), the mean over the four sides of a box, (B, H, W) float32.

    student, teacher: z_S and z_T, (B, 4, bins, H, W) logits over the bins of each side's distance.
    """
    log_student, log_teacher = ((logits.float() / tau).log_softmax(2) for logits in (student, teacher))
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(2)
    return tau**2 * divergence.mean(1)
