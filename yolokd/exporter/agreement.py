"""Measures how closely PyTorch and ONNX Runtime agree on one image, in raw outputs and in detections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn.functional import pad
from torchvision.ops import box_iou
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywh2xyxy


class Limits(BaseModel):
    """The largest differences allowed between PyTorch and ONNX Runtime."""

    model_config = ConfigDict(frozen=True)
    raw: float  # largest relative L2 error of all outputs
    scores: float  # largest relative L2 error of the scores alone: in `raw`, boxes in pixels outweigh them
    iou: float  # smallest IoU of two boxes that count as the same detection
    margin: float  # scores this close count as equal: to the threshold, or of two boxes that NMS chooses between
    ties: bool  # whether NMS may choose the other one of two boxes with equal scores


# float16 rounds a coordinate of 600 to a multiple of 0.5, and changes scores by up to 0.01. That is enough to move
# small boxes, and to make NMS choose another box of the same object, which practically never happens in float32.
LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "float32": Limits(raw=1e-4, scores=1e-4, iou=0.99, margin=1e-3, ties=False),
        "float16": Limits(raw=1e-2, scores=5e-2, iou=0.95, margin=2e-2, ties=True),
    }
)


class Thresholds(NamedTuple):
    """The settings of NMS."""

    conf: float = 0.25
    iou: float = 0.7
    agnostic: bool = False


class Prediction(NamedTuple):
    """The output of one runtime for one image: raw, and as boxes before and after NMS."""

    raw: Tensor  # (4 + classes, anchors); or (n, 6) if the model chooses its boxes itself
    candidates: Tensor  # (m, 6) before NMS: x1, y1, x2, y2, score, class
    detections: Tensor  # (n, 6) after NMS, same columns


PredictionPair = tuple[Prediction, Prediction]  # of the same image: PyTorch's, then ONNX Runtime's


def postprocess(raw: Tensor, thresholds: Thresholds, max_det: int) -> Prediction:
    """Run NMS on one image's raw output: (4 + classes, anchors), or final rows (n, 6)."""
    conf, iou, agnostic = thresholds
    detections = non_max_suppression(raw[None], conf, iou, agnostic=agnostic, max_det=max_det)[0]
    return Prediction(raw, raw if raw.shape[-1] == 6 else _candidates(raw, conf / 2), detections)


def _candidates(raw: Tensor, min_score: float) -> Tensor:
    """Return (m, 6) boxes before NMS from `raw` (4 + classes, anchors), and one more row of zeros.

    There is one row per anchor and class that scores above `min_score`: NMS may also choose between two classes.
    The row of zeros makes sure that there is at least one candidate.
    """
    classes, anchors = (raw[4:] > min_score).nonzero(as_tuple=True)
    rows = torch.cat([xywh2xyxy(raw[:4, anchors].T), raw[4 + classes, anchors, None], classes[:, None]], 1)
    return pad(rows, (0, 0, 0, 1))


def relative_errors(pairs: Sequence[PredictionPair], margin: float) -> tuple[float, float]:
    """Return the relative L2 errors of ONNX Runtime's raw outputs: of all outputs, and of the scores alone."""
    has_final_rows = pairs[0][1].raw.shape[-1] == 6
    outputs = [
        _align_rows(expected.candidates, actual.raw, margin) if has_final_rows else (expected.raw.T, actual.raw.T)
        for expected, actual in pairs
    ]
    expected, actual = (torch.cat(side).double() for side in zip(*outputs, strict=True))
    scores = slice(4, 5 if has_final_rows else None)
    return _relative_l2(expected, actual), _relative_l2(expected[:, scores], actual[:, scores])


def _relative_l2(expected: Tensor, actual: Tensor) -> float:
    distance, size = float((actual - expected).norm()), float(expected.norm())
    return distance / size if size else float("inf") if distance else 0.0


def _align_rows(candidates: Tensor, rows: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Pair final rows (n, 6) of ONNX Runtime with PyTorch's nearest candidates; return (candidates, rows).

    Rows are sorted by score, and the list has a fixed length. Rounding therefore decides which of two nearly equal
    rows comes first, and which of the lowest rows are on the list. So rows are paired by content, not by position,
    and rows that score within the margin of the lowest score are left out (unless all rows do). If the file contains
    an NMS, the candidates are the boxes before NMS; whether NMS chose the same boxes is checked on the detections.
    """
    lowest = rows[:, 4] <= rows[:, 4].min() * (1 + margin)  # false for NaN, so that such a row is compared and fails
    compared = rows if lowest.all() else rows[~lowest]
    weight = torch.tensor([1, 1, 1, 1, 100, 1e4])  # of box sides in pixels, score and class
    distances = torch.cdist(compared * weight, candidates * weight, compute_mode="donot_use_mm_for_euclid_dist")
    return candidates[distances.argmin(1)], compared


def worst_match_iou(expected: Prediction, actual: Prediction, conf: float, limits: Limits) -> float:
    """Match the detections of both runtimes one to one, and return the lowest IoU of any match.

    A match is of the same class. A detection without a match counts as IoU 0. Detections whose score is at the
    threshold `conf` are left out. If the limits allow ties, a detection may also match a candidate of equal score.
    """
    overlap = _class_iou(expected.detections, actual.detections)
    expected_ious, actual_ious = torch.zeros(len(expected.detections)), torch.zeros(len(actual.detections))
    while overlap.numel() and overlap.max() > 0:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        expected_ious[i] = actual_ious[j] = overlap[i, j]
        overlap[i], overlap[:, j] = 0, 0
    lowest = [1.0]
    for prediction, other, ious in ((expected, actual, expected_ious), (actual, expected, actual_ious)):
        if limits.ties:
            ious = ious.maximum(_best_tie_iou(prediction.detections, other.candidates, limits.margin))
        compared = (prediction.detections[:, 4] - conf).abs() > limits.margin
        lowest += ious[compared].tolist()
    return min(lowest)


def _class_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU (n, m) of every two boxes of the same class, and 0 for boxes of different classes."""
    iou: Tensor = box_iou(_sort_corners(first), _sort_corners(second)).nan_to_num(0)
    return iou * (first[:, 5:] == second[:, 5])


def _sort_corners(rows: Tensor) -> Tensor:
    """Return boxes (n, 4) with x1 <= x2 and y1 <= y2; half-trained heads without DFL also predict negative sides."""
    first, second = rows[:, :2], rows[:, 2:4]
    return torch.cat([first.minimum(second), first.maximum(second)], 1)


def _best_tie_iou(detections: Tensor, candidates: Tensor, margin: float) -> Tensor:
    """Return each detection's largest IoU (n,) with any candidate whose score is equal within the margin."""
    tie = (detections[:, 4:5] - candidates[:, 4]).abs() <= margin
    return (_class_iou(detections, candidates) * tie).amax(1)
