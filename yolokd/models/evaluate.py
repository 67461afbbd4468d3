"""Scores a detector on the user's data, and says of a teacher's score what it means."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.models.rtdetr.val import RTDETRValidator
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.utils import LOGGER

from yolokd.models.detector import Detector, only_detects
from yolokd.pyramid.pairing import ClassPairing
from yolokd.runtime.rng import preserve_random_state

USELESS_MAP = 0.05  # ours: mAP50-95 under which a teacher has nothing to teach on this data


@dataclass(frozen=True)
class Scores:
    """mAP50-95, mAP50, and AP50-95 of small (under 32² pixels of the picture), medium and large (over 96²) boxes.

    None where there is no box of that size, or sizes were not asked for.
    """

    map: float
    map50: float
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None


def score(model: Detector, settings: Mapping[str, Any], save_dir: Path) -> Scores:
    """Ultralytics' validation of a model; random streams are left as they were.

    settings: Ultralytics' for validation (data, imgsz, batch, device, split, …); `save_json=True` scores sizes too.
    """
    kind = RTDETRValidator if isinstance(model.model[-1], RTDETRDecoder) else DetectionValidator
    with preserve_random_state():
        args = {"rect": True, **settings, "mode": "val", "task": "detect", "plots": False}
        found = kind(save_dir=save_dir, args=args)(model=model)
    sizes = {
        f"ap_{size}": round(float(value), 5)
        for size in ("small", "medium", "large")
        if (value := found.get(f"metrics/mAP_{size}(B)", -1)) >= 0  # COCO's evaluation says -1 for none
    }
    return Scores(float(found["metrics/mAP50-95(B)"]), float(found["metrics/mAP50(B)"]), **sizes)


def check_teacher(
    teacher: Detector, names: Mapping[int, str], classes: ClassPairing, settings: Mapping[str, Any], save_dir: Path
) -> float | None:
    """Log the teacher's score and warn where it is useless or knows other classes; returns its mAP50-95.

    names: the data set's classes. settings: Ultralytics' for validation (data, imgsz, batch, device, …).
    None where there is nothing to score: no class is shared, or the teacher does not only detect (segments, …).
    """
    if classes.objectness:
        LOGGER.warning(
            f"teacher: knows none of the data set's classes ({', '.join(names.values())}): its score is not measured; "
            "features still carry over, class scores count as objectness only"
        )
        return None
    head = teacher.model[-1]
    if not only_detects(teacher):
        LOGGER.info(f"teacher: does more than detect ({type(head).__name__}): its score is not measured")
        return None
    found = score(aligned_copy(teacher, names, classes.mapping), settings, save_dir)
    LOGGER.info(f"teacher: mAP50-95 {found.map:.3f}, mAP50 {found.map50:.3f} on the validation set")
    unknown = [names[i] for i in sorted(set(names) - set(classes.student))]
    if unknown:
        LOGGER.warning(
            f"teacher: does not know {', '.join(unknown)}: for these the student learns from the labels alone"
        )
    if found.map < USELESS_MAP:
        LOGGER.warning(
            "teacher: useless on this validation set: the student is pulled towards maps that do not find these "
            "objects and will likely end up worse than trained alone; use a teacher trained on such images"
        )
    return found.map


def aligned_copy(model: Detector, names: Mapping[int, str], mapping: Mapping[int, int]) -> Detector:
    """A copy whose class scores follow the data set's `names`: {data's class: teacher's}, 0 for those not known."""
    copy = deepcopy(model).float().eval()

    def reorder(_module: nn.Module, _inputs: object, output: Any) -> Any:
        y = output[0]  # (B, 4 + classes, anchors)
        scores = y.new_zeros(y.shape[0], len(names), y.shape[2])
        scores[:, list(mapping)] = y[:, [4 + teacher_class for teacher_class in mapping.values()]]
        return torch.cat((y[:, :4], scores), 1), output[1]

    def relabel(head: Any, _inputs: object, output: Any) -> Any:
        boxes, scores, classes = output[0].split((4, 1, 1), -1)  # (B, n, 6), chosen by the decoder itself
        known_as = classes.new_full((head.nc,), -1)
        for data_class, teacher_class in mapping.items():
            known_as[teacher_class] = data_class
        labels = known_as[classes.long()]
        return torch.cat((boxes, scores * (labels >= 0), labels.clamp(min=0)), -1), output[1]

    copy.end2end = False
    copy.model[-1].register_forward_hook(relabel if isinstance(copy.model[-1], RTDETRDecoder) else reorder)
    copy.names = dict(names)
    return copy
