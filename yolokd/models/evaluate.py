"""Scores of a detector on the user's data, and warnings about a teacher's score."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.models.rtdetr.val import RTDETRValidator
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.utils import LOGGER

from yolokd.models.detector import Detector, only_detects
from yolokd.pyramid.pairing import ClassPairing
from yolokd.runtime.rng import preserve_random_state

USELESS_MAP = 0.05  # ours: a teacher of lower mAP50-95 has nothing to teach on this data


@dataclass(frozen=True)
class Scores:
    """mAP50-95, mAP50, and AP50-95 of small (area under 32² pixels of the image), medium, and large (over 96²) boxes.

    The last three are None if there is no box of that size, or if sizes were not requested.
    """

    map: float
    map50: float
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None


def score(model: Detector, settings: Mapping[str, Any], save_dir: Path) -> Scores:
    """Validate a model as Ultralytics does, and return its scores; the random states are left as they were.

    settings: Ultralytics' for validation (data, imgsz, batch, device, split, …); `save_json=True` scores by size, too.
    """
    validator = RTDETRValidator if isinstance(model.model[-1], RTDETRDecoder) else DetectionValidator
    with preserve_random_state():
        args = {"rect": True, **settings, "mode": "val", "task": "detect", "plots": False}
        metrics = validator(save_dir=save_dir, args=args)(model=model)
    sizes = {
        f"ap_{size}": round(float(value), 5)
        for size in ("small", "medium", "large")
        if (value := metrics.get(f"metrics/mAP_{size}(B)", -1)) >= 0  # COCO's evaluation returns -1 if there is no box
    }
    return Scores(float(metrics["metrics/mAP50-95(B)"]), float(metrics["metrics/mAP50(B)"]), **sizes)


def check_teacher(
    teacher: Detector, names: Mapping[int, str], classes: ClassPairing, settings: Mapping[str, Any], save_dir: Path
) -> float | None:
    """Log the teacher's score, warn if the score is useless or classes are unknown to it, and return its mAP50-95.

    names: the data set's classes. settings: Ultralytics' for validation (data, imgsz, batch, device, …).
    Returns None if there is nothing to score: no class in common, or a teacher that does more than detect.
    """
    if classes.objectness:
        LOGGER.warning(
            f"teacher: knows none of the data set's classes ({', '.join(names.values())}): its score is not measured; "
            "its features are still distilled, its class scores count as objectness only"
        )
        return None
    head = teacher.model[-1]
    if not only_detects(teacher):
        LOGGER.info(f"teacher: does more than detect ({type(head).__name__}): its score is not measured")
        return None
    scores = score(aligned_copy(teacher, names, classes.mapping), settings, save_dir)
    LOGGER.info(f"teacher: mAP50-95 {scores.map:.3f}, mAP50 {scores.map50:.3f} on the validation set")
    used = settings.get("classes")
    used = names if used is None else used if isinstance(used, list) else [used]
    unknown = [name for i, name in names.items() if i in used and i not in classes.student]
    if unknown:
        LOGGER.warning(
            f"teacher: does not know {', '.join(unknown)}: these classes the student learns from the labels only"
        )
    if scores.map < USELESS_MAP:
        LOGGER.warning(
            "teacher: useless on this validation set: the student would imitate features that do not detect these "
            "objects, and will likely score lower than without a teacher; use a teacher trained on such images"
        )
    return scores.map


def aligned_copy(model: Detector, names: Mapping[int, str], mapping: Mapping[int, tuple[int, ...]]) -> Detector:
    """Return a copy of a teacher that scores the data set's classes `names`, and gives 0 to classes it does not know.

    mapping: {the data set's class: the teacher's classes that mean it}; the highest of their scores counts.
    """
    copy = deepcopy(model).float().eval()

    def reorder(_module: nn.Module, _inputs: object, output: Any) -> Any:
        y = output[0]  # (B, 4 + classes, anchors)
        scores = y.new_zeros(y.shape[0], len(names), y.shape[2])
        for data_class, group in mapping.items():
            scores[:, data_class] = y[:, [4 + teacher_class for teacher_class in group]].amax(1)
        return torch.cat((y[:, :4], scores), 1), output[1]

    def relabel(head: Any, _inputs: object, output: Any) -> Any:
        boxes, scores, classes = output[0].split((4, 1, 1), -1)  # (B, n, 6): the decoder selects boxes by itself
        data_classes = classes.new_full((head.nc,), -1)
        for data_class, group in mapping.items():
            data_classes[list(group)] = data_class
        labels = data_classes[classes.long()]
        counts = (labels >= 0) & ~_repeated(torch.cat((boxes, labels), -1))[..., None]
        return torch.cat((boxes, scores * counts, labels.clamp(min=0)), -1), output[1]

    copy.end2end = False
    copy.model[-1].register_forward_hook(relabel if isinstance(copy.model[-1], RTDETRDecoder) else reorder)
    copy.names = dict(names)
    return copy


def _repeated(detections: Tensor) -> Tensor:
    """Return for each detection whether an earlier one, of a higher score, has the same box and label.

    An RT-DETR gives a box once for each class that it may be of, and several of these can mean the same class.
    detections: (B, n, 5), boxes and labels. Returns (B, n) booleans.
    """
    same = (detections[:, :, None] == detections[:, None]).all(-1)
    return same.tril(-1).any(-1)
