"""Scores of a detector on the user's data, and warnings about a teacher's score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.models.rtdetr.val import RTDETRValidator
from ultralytics.nn.modules.head import RTDETRDecoder
from ultralytics.utils import LOGGER

from yolokd.data.dataset import learned_names
from yolokd.models.channels import seen_channels, select_channels
from yolokd.models.detector import Detector, image_channels
from yolokd.models.tasks import TASKS, Task, scored_task
from yolokd.pyramid.pairing import ClassPairing
from yolokd.runtime.rng import preserve_random_state

# The settings that change the score of a model on the same images and labels.
SCORE_SETTINGS = ("overlap_mask", "mask_ratio", "iou", "max_det", "agnostic_nms")
# The settings of a training that its own validations use, and so a score that is compared with theirs.
VALIDATION_SETTINGS = ("data", "imgsz", "workers", "single_cls", *SCORE_SETTINGS)
USELESS_MAP = 0.05  # ours: a teacher of lower mAP50-95 has nothing to teach on this data


@dataclass(frozen=True)
class Scores:
    """mAP50-95, mAP50, and AP50-95 of small (area under 32² pixels of the image), medium, and large (over 96²) boxes.

    metric: what the first two compare, as in Task. box_map, box_map50: those of upright boxes, for tasks that are
    scored on something else.
    AP by size is None for other tasks than detection, if there is no box of that size, or if sizes were not requested.
    """

    metric: str
    map: float
    map50: float
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    box_map: float | None = None
    box_map50: float | None = None


@dataclass(frozen=True)
class ClassScores:
    """A task's deciding mAP50-95 and mAP50, AP50-95 of each class that has a label, and the number of images scored."""

    map: float
    map50: float
    by_class: dict[str, float]
    images: int


def score(model: Detector, settings: Mapping[str, Any], save_dir: Path, task: Task) -> Scores:
    """Validate a model on a task as Ultralytics does, and return its scores; the random states are left as they were.

    settings: Ultralytics' for validation (data, imgsz, batch, device, split, …); `save_json=True` scores by size, too.
    """
    by_size = {} if task.name == "detect" else {"save_json": False}  # Ultralytics scores upright boxes alone by size
    metrics, _ = _validate(model, {"rect": True, **settings, **by_size}, save_dir, task)
    sizes = {
        f"ap_{size}": round(float(value), 5)
        for size in ("small", "medium", "large")
        if (value := metrics.get(f"metrics/mAP_{size}(B)", -1)) >= 0  # COCO's evaluation returns -1 if there is no box
    }
    values = {"map": task.score_column("mAP50-95"), "map50": task.score_column("mAP50")}
    if task.letter != "B":
        values |= {"box_map": "metrics/mAP50-95(B)", "box_map50": "metrics/mAP50(B)"}
    return Scores(metric=task.metric, **{key: float(metrics[column]) for key, column in values.items()}, **sizes)


def score_by_class(
    model: Detector | str, settings: Mapping[str, Any], save_dir: Path, task: Task, names: Mapping[int, str]
) -> ClassScores:
    """Validate a model, or an exported file by its path, and return its scores by class.

    settings: as those of `score`. names: of the classes, as the scores are to call them.
    """
    _, validator = _validate(model, settings, save_dir, task)
    part = getattr(validator.metrics, task.part)
    by_class = {names[int(i)]: float(ap) for i, ap in zip(part.ap_class_index, part.ap, strict=True)}
    return ClassScores(float(part.map), float(part.map50), by_class, len(validator.dataloader.dataset))


def _validate(
    model: Detector | str, settings: Mapping[str, Any], save_dir: Path, task: Task
) -> tuple[dict[str, Any], Any]:
    """Return the metrics of Ultralytics' validation and the validator; the random states are left as they were."""
    is_rtdetr = not isinstance(model, str) and isinstance(model.model[-1], RTDETRDecoder)
    validator = RTDETRValidator if is_rtdetr else TASKS[task.name].validator  # a YOLO may teach an RT-DETR
    with preserve_random_state():
        run = validator(save_dir=save_dir, args={**settings, "mode": "val", "task": task.name, "plots": False})
        return run(model=model), run


def check_teacher(
    teacher: Detector,
    student: Task,
    data: Mapping[str, Any],
    classes: ClassPairing,
    settings: Mapping[str, Any],
    save_dir: Path,
    channels: tuple[int, ...] | None = None,
) -> float | None:
    """Log the teacher's score, warn if it is useless or classes are unknown to it, and return its deciding mAP50-95.

    student: its task. data: Ultralytics' dictionary of the data set. settings: Ultralytics' for validation (data,
    imgsz, batch, device, …). channels: of the images that the teacher sees, as in `select_channels`.
    Returns None if there is nothing to score (no class in common, or rotated boxes for a student of upright ones), or
    if the teacher is scored on its boxes while the student is scored on something else.
    """
    names: Mapping[int, str] = data["names"]
    if classes.objectness:
        LOGGER.warning(
            f"teacher: knows none of the data set's classes ({', '.join(names.values())}): its score is not measured; "
            "its features are still distilled, its class scores count as objectness only"
        )
        return None
    task = scored_task(teacher, student, data)
    if task is None:
        LOGGER.info("teacher: finds rotated boxes, and the labels' are upright: its score is not measured")
        return None
    scores = score(aligned_copy(teacher, names, classes.mapping, task, channels), settings, save_dir, task)
    boxes = "" if task is student else f" (of its boxes: it has no {student.own} like those of the labels)"
    score_text = f"{task.score_name} {scores.map:.3f}, mAP50 {scores.map50:.3f}"
    LOGGER.info(f"teacher: {score_text} on the validation set{boxes}")
    learned = learned_names(data, settings.get("classes"))
    unknown = [name for i, name in learned.items() if i not in classes.student]
    if unknown:
        LOGGER.warning(f"teacher: does not know {', '.join(unknown)}: the student learns these from the labels only")
    if scores.map < USELESS_MAP:
        LOGGER.warning(
            "teacher: useless on this validation set: the student would imitate features that do not detect these "
            "objects, and will likely score lower than without a teacher; use a teacher trained on such images"
        )
    return scores.map if task is student else None


def copy_for_data(
    model: Detector,
    data: Mapping[str, Any],
    task: Task,
    mapping: Mapping[int, tuple[int, ...]],
    teacher_channels: Sequence[int] | None = None,
) -> Detector:
    """Return an `aligned_copy` of a model for Ultralytics' dictionary of a data set.

    teacher_channels: as in the configuration. Raises UserError if the images' channels do not fit.
    """
    channels = seen_channels(image_channels(model), data["channels"], teacher_channels)
    return aligned_copy(model, data["names"], mapping, task, channels)


def aligned_copy(
    model: Detector,
    names: Mapping[int, str],
    mapping: Mapping[int, tuple[int, ...]],
    task: Task = TASKS["detect"],
    channels: tuple[int, ...] | None = None,
) -> Detector:
    """Return a copy of a teacher that scores the data set's classes `names`, and gives 0 to classes it does not know.

    mapping: {the data set's class: the teacher's classes that mean it}; the highest of their scores counts. task: on
    which the copy is scored; for detection, its masks or keypoints are left out. channels: of the images that it sees,
    as in `select_channels`.
    """
    copy, end = deepcopy(model).float().eval(), 4 + len(model.names)

    def reorder(_module: nn.Module, _inputs: object, output: Any) -> Any:
        # (B, 4 + classes + own, anchors), and the prototypes of a segmentation head.
        y, *proto = output[0] if isinstance(output[0], tuple) else (output[0],)
        scores = y.new_zeros(y.shape[0], len(names), y.shape[2])
        for data_class, group in mapping.items():
            scores[:, data_class] = y[:, [4 + teacher_class for teacher_class in group]].amax(1)
        if not task.own:
            return torch.cat((y[:, :4], scores), 1), output[1]
        aligned = torch.cat((y[:, :4], scores, y[:, end:]), 1)
        return (aligned, *proto) if proto else aligned, output[1]

    def relabel(head: Any, _inputs: object, output: Any) -> Any:
        # (B, n, 6 + own): the decoder, or an end-to-end head without its one-to-many branch, selects boxes by itself.
        boxes, scores, classes, own = output[0].tensor_split((4, 5, 6), -1)
        data_classes = classes.new_full((head.nc,), -1)
        for data_class, group in mapping.items():
            data_classes[list(group)] = data_class
        labels = data_classes[classes.long()]
        counts = (labels >= 0) & ~_repeated(torch.cat((boxes, labels), -1))[..., None]
        return torch.cat((boxes, scores * counts, labels.clamp(min=0), own), -1), output[1]

    copy.end2end = False
    selects = isinstance(head := copy.model[-1], RTDETRDecoder) or getattr(head, "cv2", head) is None
    head.register_forward_hook(relabel if selects else reorder)
    copy.names = dict(names)
    if channels is not None:
        copy.register_forward_pre_hook(lambda _, inputs: (select_channels(inputs[0], channels), *inputs[1:]))
    return copy


def _repeated(detections: Tensor) -> Tensor:
    """Return for each detection whether an earlier one, of a higher score, has the same box and label.

    An RT-DETR gives a box once for each class that it may be of, and several of these can mean the same class.
    detections: (B, n, 5), boxes and labels. Returns (B, n) booleans.
    """
    same = (detections[:, :, None] == detections[:, None]).all(-1)
    return same.tril(-1).any(-1)
