"""The tasks of YOLO models that can learn: Ultralytics' classes for each, and the score that decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.models.rtdetr.val import RTDETRValidator
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.models.yolo.obb import OBBTrainer, OBBValidator
from ultralytics.models.yolo.pose import PoseTrainer, PoseValidator
from ultralytics.models.yolo.segment import SegmentationTrainer, SegmentationValidator
from ultralytics.nn.modules.head import OBB, Detect, Pose, RTDETRDecoder, Segment
from ultralytics.nn.tasks import DetectionModel, OBBModel, PoseModel, RTDETRDetectionModel, SegmentationModel

from yolokd.models.detector import PROMPTED_HEADS, Detector, head_of


@dataclass(frozen=True)
class Task:
    """One task of YOLO models.

    name: Ultralytics'. head, model, trainer, validator: Ultralytics' classes. metric: what the deciding mAP compares.
    part: the attribute of Ultralytics' metrics that holds it. letter: in parentheses behind the names of its columns in
    results.csv. own: what the head predicts beside class scores and upright boxes; empty if nothing. shapes: the name
    of the drawn data set with its labels.
    """

    name: str
    head: type[nn.Module]
    model: type[Any]
    trainer: type[Any]
    validator: type[Any]
    metric: str
    part: str
    letter: str
    own: str
    shapes: str

    @property
    def score_name(self) -> str:
        """Return the name of the score that decides, for people."""
        return "mAP50-95" if self.metric == "box" else f"{self.metric} mAP50-95"

    def score_column(self, score: str) -> str:
        """Return the name of a deciding score's column in results.csv.

        >>> TASKS["segment"].score_column("mAP50-95")
        'metrics/mAP50-95(M)'
        """
        return f"metrics/{score}({self.letter})"

    def build(self, cfg: Any, data: Mapping[str, Any]) -> Detector:
        """Return a model with random weights. cfg: of a .yaml. data: Ultralytics' dictionary of the data set."""
        shape = {"data_kpt_shape": data["kpt_shape"]} if self.name == "pose" else {}
        return self.model(cfg, nc=data["nc"], ch=data["channels"], verbose=False, **shape)


# Detection comes after the other tasks of YOLO models, because all their heads inherit from its head. An RT-DETR, which
# detects, too, is built and trained by classes of its own.
TASKS = {
    "segment": Task(
        "segment", Segment, SegmentationModel, SegmentationTrainer, SegmentationValidator,
        "mask", "seg", "M", "masks", "shapes-seg",
    ),
    "pose": Task(
        "pose", Pose, PoseModel, PoseTrainer, PoseValidator, "pose", "pose", "P", "keypoints", "shapes-pose"
    ),
    "obb": Task("obb", OBB, OBBModel, OBBTrainer, OBBValidator, "rotated box", "box", "B", "angles", "shapes-obb"),
    "detect": Task(
        "detect", Detect, DetectionModel, DetectionTrainer, DetectionValidator, "box", "box", "B", "", "shapes"
    ),
    "rtdetr": Task(
        "detect", RTDETRDecoder, RTDETRDetectionModel, RTDETRTrainer, RTDETRValidator, "box", "box", "B", "", "shapes"
    ),
}  # fmt: skip


YOLO_TASKS = tuple(key for key in TASKS if key != "rtdetr")


def task_of(model: Detector) -> Task | None:
    """Return the task of a model by its head; None if such a model cannot be a student."""
    head = head_of(model)
    if isinstance(head, PROMPTED_HEADS):
        return None
    return next((task for task in TASKS.values() if isinstance(head, task.head)), None)


def key_of(task: Task) -> str:
    """Return the key of a task in TASKS."""
    return next(key for key, value in TASKS.items() if value is task)


def scored_task(teacher: Detector, student: Task, data: Mapping[str, Any]) -> Task | None:
    """Return the task on whose labels a student's teacher can be scored: the student's, or else detection.

    data: Ultralytics' dictionary of the data set. Returns None for a teacher of rotated boxes, if the student's are
    upright.
    """
    own = task_of(teacher)
    is_same = own is not None and own.name == student.name  # an RT-DETR and a YOLO both detect
    if is_same and (student.name != "pose" or list(head_of(teacher).kpt_shape) == list(data["kpt_shape"])):  # type: ignore[union-attr, arg-type]
        return student
    return None if own is TASKS["obb"] else TASKS["detect"]
