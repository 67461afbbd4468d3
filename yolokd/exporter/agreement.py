"""How far two runtimes agree on one image: raw outputs and detections."""

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
    """How far apart PyTorch and ONNX Runtime may be."""

    model_config = ConfigDict(frozen=True)
    raw: float  # relative L2 of the whole output
    scores: float  # the same of the scores alone: beside box sides in pixels they hardly count in the whole
    iou: float  # least overlap of two boxes that pass for the same detection
    margin: float  # scores this close are a tie: to the threshold, or of two boxes that NMS chooses between
    ties: bool  # whether NMS may choose the other box of a tie


# float16 rounds a coordinate of 600 to a half, and moves scores by up to 0.01: enough to move small boxes and to turn a
# choice between two boxes of one object, which in float32 practically never happens.
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


class View(NamedTuple):
    """What one runtime sees in one image, in comparable form."""

    raw: Tensor  # (4 + classes, anchors), or final rows (n, 6)
    candidates: Tensor  # (m, 6) before NMS: x1, y1, x2, y2, score, class
    detections: Tensor  # (n, 6) after it


Pair = tuple[View, View]  # the same image in PyTorch and in ONNX Runtime


def _view(raw: Tensor, thresholds: Thresholds, most: int) -> View:
    conf, iou, agnostic = thresholds
    detections = non_max_suppression(raw[None], conf, iou, agnostic=agnostic, max_det=most)[0]
    return View(raw, raw if raw.shape[-1] == 6 else _boxes(raw, conf / 2), detections)


def _boxes(raw: Tensor, least: float) -> Tensor:
    """(4 + classes, anchors) -> (m, 6): every anchor with every class that scores above `least`, and a row of zeros.

    Two classes may tie as two boxes may. Thanks to the zeros there is always a candidate, however far from the mark.
    """
    classes, anchors = (raw[4:] > least).nonzero(as_tuple=True)
    rows = torch.cat([xywh2xyxy(raw[:4, anchors].T), raw[4 + classes, anchors, None], classes[:, None]], 1)
    return pad(rows, (0, 0, 0, 1))


def _raw_errors(pairs: Sequence[Pair], margin: float) -> tuple[float, float]:
    """The relative L2 distance of all outputs, and of the scores alone."""
    final = pairs[0][1].raw.shape[-1] == 6
    sides = [
        _aligned(expected.candidates, actual.raw, margin) if final else (expected.raw.T, actual.raw.T)
        for expected, actual in pairs
    ]
    expected, actual = (torch.cat(side).double() for side in zip(*sides, strict=True))
    scores = slice(4, 5 if final else None)
    return _relative(expected, actual), _relative(expected[:, scores], actual[:, scores])


def _relative(expected: Tensor, actual: Tensor) -> float:
    distance, size = float((actual - expected).norm()), float(expected.norm())
    return distance / size if size else float("inf") if distance else 0.0


def _aligned(candidates: Tensor, rows: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Final rows (n, 6) of ONNX Runtime, each beside PyTorch's nearest.

    Rows are sorted by score and the list is cut at its end: rounding decides which of two nearly equal rows comes
    first, and which of the last ones is on the list at all. So a row finds its partner by what it says, not by where
    it stands, and rows that hardly differ from the lowest score look for none (unless all are such). With an embedded
    NMS the partner is sought among the boxes before NMS; whether NMS chose the same is for the detections to tell.
    """
    last = rows[:, 4] <= rows[:, 4].min() * (1 + margin)  # false for NaN, which must not get away
    judged = rows if last.all() else rows[~last]
    weight = torch.tensor([1, 1, 1, 1, 100, 1e4])  # of sides in pixels, score and class
    gap = torch.cdist(judged * weight, candidates * weight, compute_mode="donot_use_mm_for_euclid_dist")
    return candidates[gap.argmin(1)], judged


def _agreement(ours: View, theirs: View, conf: float, limits: Limits) -> float:
    """The least overlap of any detection with its partner of the same class on the other side; 0 without a partner.

    Detections at the threshold are left out; a tie that NMS decided the other way is no disagreement.
    """
    overlap = _overlap(ours.detections, theirs.detections)
    partners = (torch.zeros(len(ours.detections)), torch.zeros(len(theirs.detections)))
    while overlap.numel() and overlap.max() > 0:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        partners[0][i] = partners[1][j] = overlap[i, j]
        overlap[i], overlap[:, j] = 0, 0
    least = [1.0]
    for view, other, found in ((ours, theirs, partners[0]), (theirs, ours, partners[1])):
        if limits.ties:
            found = found.maximum(_best_tie(view.detections, other.candidates, limits.margin))
        judged = (view.detections[:, 4] - conf).abs() > limits.margin
        least += found[judged].tolist()
    return min(least)


def _overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """The IoU (n, m) of boxes of the same class, 0 for others."""
    iou: Tensor = box_iou(_upright(ours), _upright(theirs)).nan_to_num(0)
    return iou * (ours[:, 5:] == theirs[:, 5])


def _upright(rows: Tensor) -> Tensor:
    """The boxes with their corners in order: half-trained heads without DFL also predict negative sides."""
    first, second = rows[:, :2], rows[:, 2:4]
    return torch.cat([first.minimum(second), first.maximum(second)], 1)


def _best_tie(detections: Tensor, candidates: Tensor, margin: float) -> Tensor:
    """The largest overlap of each detection with any candidate that scores the same within the margin."""
    tie = (detections[:, 4:5] - candidates[:, 4]).abs() <= margin
    return (_overlap(detections, candidates) * tie).amax(1)
