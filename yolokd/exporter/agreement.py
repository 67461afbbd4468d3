"""Measures how closely PyTorch and the runtime of an exported file agree on an image: raw outputs, detections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import box_iou
from ultralytics.utils.metrics import batch_probiou
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import process_mask, xywh2xyxy


class Limits(BaseModel):
    """The largest differences allowed between PyTorch and the runtime of an exported file."""

    model_config = ConfigDict(frozen=True)
    raw: float  # largest relative L2 error of all outputs
    scores: float  # largest relative L2 error of the scores alone: in `raw`, boxes in pixels outweigh them
    iou: float  # smallest IoU of two boxes that count as the same detection
    margin: float  # scores this close count as equal: to the threshold, or of two boxes that NMS chooses between
    ties: bool  # whether NMS may choose the other one of two boxes with equal scores
    own: float = 0.95  # smallest agreement of a detection's mask or keypoints, see `own_agreement`


# float16 rounds a coordinate of 600 to a multiple of 0.5, and changes scores by up to 0.01. That is enough to move
# small boxes, and to make NMS choose another box of the same object, which practically never happens in float32.
# "reduced": runtimes that choose their arithmetic. OpenVINO computes in bfloat16 where the CPU can, NCNN in float16.
# INT8 loses detections here and there: what that costs, only the mAP of a whole data set tells (`yolokd deploy`). Its
# limits find files that are broken, such as one that rounds all scores to 0, whose relative error is 1.
LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "float32": Limits(raw=1e-4, scores=1e-4, iou=0.99, margin=1e-3, ties=False),
        "float16": Limits(raw=1e-2, scores=5e-2, iou=0.95, margin=2e-2, ties=True, own=0.9),
        "reduced": Limits(raw=3e-2, scores=0.1, iou=0.9, margin=5e-2, ties=True, own=0.85),
        "int8": Limits(raw=0.2, scores=0.9, iou=0.0, margin=0.1, ties=True, own=0.0),
    }
)


class Thresholds(NamedTuple):
    """The settings of NMS."""

    conf: float = 0.25
    iou: float = 0.7
    agnostic: bool = False


class OutputLayout(NamedTuple):
    """Says what the rows of a model's output mean. task: its name. classes: their number. kpt_shape: of pose models."""

    task: str
    classes: int
    kpt_shape: tuple[int, int] = (0, 0)


class ImageOutput(NamedTuple):
    """A model's output for one image.

    rows: (4 + classes + own, anchors); or, if the model chooses its boxes itself, `final` rows (n, 6 + own). The own
    numbers are mask coefficients, keypoints or an angle. prototypes: (coefficients, H, W) of masks, or None.
    """

    rows: Tensor
    final: bool
    prototypes: Tensor | None = None


class Prediction(NamedTuple):
    """The output of one runtime for one image: raw, and as boxes before and after NMS.

    A box is x1, y1, x2, y2, score, class, own numbers; a rotated one has centre and size in the first four columns.
    """

    output: ImageOutput
    candidates: Tensor  # (m, 6 + own) before NMS
    detections: Tensor  # (n, 6 + own) after NMS


PredictionPair = tuple[Prediction, Prediction]  # of the same image: PyTorch's, then the file's


def postprocess(output: ImageOutput, layout: OutputLayout, thresholds: Thresholds, max_det: int) -> Prediction:
    """Run NMS on one image's raw output."""
    conf, iou, agnostic = thresholds
    rotated = layout.task == "obb"
    detections = non_max_suppression(
        output.rows[None], conf, iou, agnostic=agnostic, max_det=max_det, nc=layout.classes, rotated=rotated,
        end2end=output.final,
    )[0]  # fmt: skip
    candidates = output.rows if output.final else _candidates(output.rows, layout, conf / 2)
    return Prediction(output, candidates, detections)


def _candidates(raw: Tensor, layout: OutputLayout, min_score: float) -> Tensor:
    """Return (m, 6 + own) boxes before NMS from `raw` (4 + classes + own, anchors), and one more row of zeros.

    There is one row per anchor and class that scores above `min_score`: NMS may also choose between two classes.
    The row of zeros makes sure that there is at least one candidate.
    """
    end = 4 + layout.classes
    classes, anchors = (raw[4:end] > min_score).nonzero(as_tuple=True)
    boxes = raw[:4, anchors].T if layout.task == "obb" else xywh2xyxy(raw[:4, anchors].T)
    rows = torch.cat([boxes, raw[4 + classes, anchors, None], classes[:, None], raw[end:, anchors].T], 1)
    return pad(rows, (0, 0, 0, 1))


def relative_errors(pairs: Sequence[PredictionPair], layout: OutputLayout, margin: float) -> tuple[float, float]:
    """Return the relative L2 errors of the file's raw outputs: of all outputs, and of the scores alone."""
    final = pairs[0][1].output.final
    outputs = [
        _align_rows(expected.candidates, actual.output.rows, margin)
        if final
        else (expected.output.rows.T, actual.output.rows.T)
        for expected, actual in pairs
    ]
    expected, actual = (torch.cat(side).double() for side in zip(*outputs, strict=True))
    scores = slice(4, 5 if final else 4 + layout.classes)
    errors = [_relative_l2(expected, actual)]
    for first, second in pairs:
        if first.output.prototypes is not None and second.output.prototypes is not None:
            errors.append(_relative_l2(first.output.prototypes.double(), second.output.prototypes.double()))
    return max(errors), _relative_l2(expected[:, scores], actual[:, scores])


def _relative_l2(expected: Tensor, actual: Tensor) -> float:
    distance, size = float((actual - expected).norm()), float(expected.norm())
    return distance / size if size else float("inf") if distance else 0.0


def _align_rows(candidates: Tensor, rows: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Pair final rows (n, 6 + own) of the file with PyTorch's nearest candidates; return (candidates, rows).

    Rows are sorted by score, and the list has a fixed length. Rounding therefore decides which of two nearly equal
    rows comes first, and which of the lowest rows are on the list. So rows are paired by content, not by position,
    and rows that score within the margin of the lowest score are left out (unless all rows do). If the file contains
    an NMS, the candidates are the boxes before NMS; whether NMS chose the same boxes is checked on the detections.
    """
    lowest = rows[:, 4] <= rows[:, 4].min() * (1 + margin)  # false for NaN, so that such a row is compared and fails
    compared = rows if lowest.all() else rows[~lowest]
    weight = torch.tensor([1, 1, 1, 1, 100, 1e4])  # of box sides in pixels, score and class
    sides = (compared[:, :6] * weight, candidates[:, :6] * weight)
    distances = torch.cdist(*sides, compute_mode="donot_use_mm_for_euclid_dist")
    return candidates[distances.argmin(1)], compared


def worst_match(
    expected: Prediction, actual: Prediction, layout: OutputLayout, size: tuple[int, int], conf: float, limits: Limits
) -> tuple[float, float]:
    """Match the detections of both runtimes one to one; return the lowest IoU, and the lowest own agreement, of any.

    A match is of the same class. A detection without a match counts as IoU 0. Detections whose score is at the
    threshold `conf` are left out. If the limits allow ties, a detection may also match a candidate of equal score.
    size: height and width of the image.
    """
    overlap = _class_iou(expected.detections, actual.detections, layout)
    expected_ious, actual_ious = torch.zeros(len(expected.detections)), torch.zeros(len(actual.detections))
    agreements = [1.0]
    while overlap.numel() and overlap.max() > 0:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        expected_ious[i] = actual_ious[j] = overlap[i, j]
        if overlap[i, j] >= limits.iou:
            agreements.append(own_agreement(expected, actual, i, j, layout, size))
        overlap[i], overlap[:, j] = 0, 0
    lowest = [1.0]
    for prediction, other, ious in ((expected, actual, expected_ious), (actual, expected, actual_ious)):
        if limits.ties:
            ious = ious.maximum(_best_tie_iou(prediction.detections, other.candidates, layout, limits.margin))
        compared = (prediction.detections[:, 4] - conf).abs() > limits.margin
        lowest += ious[compared].tolist()
    return min(lowest), min(agreements)


def own_agreement(
    expected: Prediction, actual: Prediction, i: int, j: int, layout: OutputLayout, size: tuple[int, int]
) -> float:
    """Return how well what a task adds to a box agrees, of detections number i and j: in 0..1, and 1 is equality.

    For masks it is their IoU. For keypoints it is 1 − d / D, but at least 0, with d the largest distance of a keypoint
    to its partner and D the diagonal of the box. Other tasks add nothing: rotated boxes are compared by their IoU.
    """
    pair = ((expected, expected.detections[i]), (actual, actual.detections[j]))
    if layout.task == "segment":
        first, second = (_mask(side.output.prototypes, row, size) for side, row in pair)
        union = int((first | second).sum())
        return int((first & second).sum()) / union if union else 1.0
    if layout.task == "pose":
        keypoints = [row[6:].view(layout.kpt_shape)[:, :2] for _, row in pair]
        diagonal = (pair[0][1][2:4] - pair[0][1][:2]).norm()
        return max(float(1 - (keypoints[0] - keypoints[1]).norm(dim=1).max() / diagonal), 0.0)
    return 1.0


def _mask(prototypes: Tensor | None, row: Tensor, size: tuple[int, int]) -> Tensor:
    assert prototypes is not None
    mask: Tensor = process_mask(prototypes, row[None, 6:], row[None, :4], size, upsample=True)[0].bool()
    return mask


def _class_iou(first: Tensor, second: Tensor, layout: OutputLayout) -> Tensor:
    """Return the IoU (n, m) of every two boxes of the same class, and 0 for boxes of different classes."""
    if layout.task == "obb":
        boxes = (torch.cat([rows[:, :4], rows[:, 6:]], 1).double() for rows in (first, second))
        iou: Tensor = batch_probiou(*boxes).nan_to_num(0).float()
    else:
        iou = box_iou(_sort_corners(first), _sort_corners(second)).nan_to_num(0)
    return iou * (first[:, 5:6] == second[:, 5])


def _sort_corners(rows: Tensor) -> Tensor:
    """Return boxes (n, 4) with x1 <= x2 and y1 <= y2; half-trained heads without DFL also predict negative sides."""
    first, second = rows[:, :2], rows[:, 2:4]
    return torch.cat([first.minimum(second), first.maximum(second)], 1)


def _best_tie_iou(detections: Tensor, candidates: Tensor, layout: OutputLayout, margin: float) -> Tensor:
    """Return each detection's largest IoU (n,) with any candidate whose score is equal within the margin."""
    tie = (detections[:, 4:5] - candidates[:, 4]).abs() <= margin
    return (_class_iou(detections, candidates, layout) * tie).amax(1)


def image_outputs(output: object, final: bool) -> Iterator[ImageOutput]:
    """Yield the output of each image of a batch. output: rows, or rows and prototypes, of the whole batch."""
    rows, *others = output if isinstance(output, list | tuple) else (output,)
    prototypes = others[0] if others else [None] * len(rows)
    for image_rows, image_prototypes in zip(rows, prototypes, strict=True):
        yield ImageOutput(image_rows, final, image_prototypes)
