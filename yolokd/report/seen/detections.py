"""What a detector finds in images, and how it differs from labels and from another detector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment
from ultralytics import YOLO
from ultralytics.engine.results import Results
from ultralytics.utils.metrics import box_iou

from yolokd.data.dataset import Image
from yolokd.patches.safe_loading import safe_loading
from yolokd.report.seen.samples import Boxes, Sample, visible
from yolokd.runtime.console import warnings_only

CONF = 0.25  # Ultralytics' default in predictions: the least score of a detection
IOU = 0.5  # ours: two boxes that overlap by as much are of one object

Mask = npt.NDArray[np.bool_]


def detect(
    file: Path,
    samples: Sequence[Sample],
    imgsz: int,
    device: torch.device,
    trust: bool = False,
    channels: Sequence[int] | None = None,
) -> list[Boxes]:
    """Return what a checkpoint detects in each image with a score of at least CONF, as `yolokd predict` does.

    channels: those of the images that it sees, in its own order, three as RGB; None: all, as they are.
    """
    with safe_loading(trust), warnings_only():
        model = YOLO(str(file))
        images = [_select(sample.image, channels) for sample in samples]
        keys = {"conf": CONF, "imgsz": imgsz, "device": str(device), "verbose": False, "save": False}
        results = [model.predict(image, **keys)[0] for image in images]
    return [_boxes(result.cpu().numpy()) for result in results]


def _boxes(result: Results) -> Boxes:
    """Return what Ultralytics found in an image, with the outlines of masks and rotated boxes, and with keypoints."""
    found = result.boxes if result.boxes is not None else result.obb
    outlines = result.masks.xyn if result.masks is not None else result.obb.xyxyxyxyn if result.obb is not None else ()
    scored = result.keypoints
    keypoints = () if scored is None else map(visible, np.concatenate([scored.xyn, scored.data[..., 2:]], axis=-1))
    height, width = result.orig_shape
    corners = found.xyxy / np.array([width, height] * 2, np.float32)
    return Boxes(corners, found.cls.astype(np.int64), found.conf, tuple(outlines), tuple(keypoints))


def _select(image: Image, channels: Sequence[int] | None) -> Image:
    """Return an image (height, width, channels), three channels as BGR, with these channels of it, counted as RGB."""
    if channels is None:
        return image
    selected = _swapped(image)[..., list(channels)]
    return np.ascontiguousarray(_swapped(selected))


def _swapped(image: Image) -> Image:
    """Return an image of three channels as RGB if it is BGR, and as BGR if it is RGB; others as they are."""
    return image[..., ::-1] if image.shape[2] == 3 else image


def in_data_classes(boxes: Boxes, mapping: Mapping[int, Sequence[int]]) -> Boxes:
    """Return a teacher's boxes with the data set's classes, -1 for those that it does not have.

    mapping: {the data set's class: the teacher's classes that mean it}.
    """
    meanings = {taught: own for own, group in mapping.items() for taught in group}
    classes = np.array([meanings.get(int(label), -1) for label in boxes.classes], np.int64)
    return replace(boxes, classes=classes)


def only_classes(boxes: Boxes, classes: Sequence[int] | None) -> Boxes:
    """Return the boxes of some classes; all for None."""
    return boxes if classes is None else boxes.select(np.isin(boxes.classes, list(classes)))


@dataclass(frozen=True)
class Differences:
    """How two lists of boxes and the labels of an image match; a mask for each list: which boxes have a partner.

    teacher_right, student_right: in the labels. teacher_shared, student_shared: in the other model's boxes.
    labels_found: labels that either model finds.
    """

    teacher_right: Mask
    student_right: Mask
    teacher_shared: Mask
    student_shared: Mask
    labels_found: Mask


def differences(labels: Boxes, teacher: Boxes, student: Boxes, ignore_classes: bool = False) -> Differences:
    """Return how the boxes of two models differ from each other and from the labels."""
    by_teacher, teacher_right = match(labels, teacher, ignore_classes)
    by_student, student_right = match(labels, student, ignore_classes)
    teacher_shared, student_shared = match(teacher, student, ignore_classes)
    return Differences(teacher_right, student_right, teacher_shared, student_shared, by_teacher | by_student)


def match(a: Boxes, b: Boxes, ignore_classes: bool = False) -> tuple[Mask, Mask]:
    """Return which boxes of two lists have a partner in the other: of the same class, with an IoU of at least IOU.

    Each has at most one; the sum of the partners' IoU is as large as it can be.
    """
    overlaps = box_iou(torch.from_numpy(a.corners).float(), torch.from_numpy(b.corners).float()).numpy()
    fits = overlaps >= IOU
    if not ignore_classes:
        fits &= a.classes[:, None] == b.classes[None]
    rows, columns = linear_sum_assignment(np.where(fits, overlaps, 0.0), maximize=True)
    matched = fits[rows, columns]
    masks = np.zeros(len(a), bool), np.zeros(len(b), bool)
    masks[0][rows[matched]], masks[1][columns[matched]] = True, True
    return masks
