"""The trainers of all tasks: the same overrides around Ultralytics' own trainer of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralytics.models.rtdetr.train import RTDETRTrainer
from ultralytics.models.yolo.obb import OBBTrainer
from ultralytics.models.yolo.pose import PoseTrainer
from ultralytics.models.yolo.segment import SegmentationTrainer

from yolokd.models.checkpoint import student_task
from yolokd.patches.patched import Converted
from yolokd.training import logs
from yolokd.training.trainer import DistillationTrainer


class SegmentationDistillationTrainer(DistillationTrainer, SegmentationTrainer):
    """Ultralytics' segmentation trainer with a teacher."""

    TASK = "segment"


class PoseDistillationTrainer(DistillationTrainer, PoseTrainer):
    """Ultralytics' pose trainer with a teacher."""

    TASK = "pose"


class OBBDistillationTrainer(DistillationTrainer, OBBTrainer):
    """Ultralytics' trainer of rotated boxes with a teacher."""

    TASK = "obb"


class RTDETRDistillationTrainer(DistillationTrainer, RTDETRTrainer):
    """Ultralytics' trainer of RT-DETRs with a teacher of their feature maps."""

    loss_items = Converted(logs.with_criterion_items)


TRAINERS = {
    trainer.TASK: trainer
    for trainer in (
        DistillationTrainer,
        SegmentationDistillationTrainer,
        PoseDistillationTrainer,
        OBBDistillationTrainer,
    )
} | {"rtdetr": RTDETRDistillationTrainer}


def make_trainer(
    overrides: Mapping[str, Any], callbacks: dict[str, Any] | None = None, **cfg: Any
) -> DistillationTrainer:
    """Return a trainer of the task of the student, which `overrides` name as `model`.

    cfg: Ultralytics' settings that the overrides go over. Raises UserError for what cannot work.
    """
    task = student_task(overrides.get("model"), bool(overrides.get("trust")))
    return TRAINERS[task](overrides=dict(overrides), _callbacks=callbacks, **cfg)
