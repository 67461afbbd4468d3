"""The criterion of an RT-DETR student: its maps are distilled, and its loss of a set of boxes stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.modules.head import RTDETRDecoder

from yolokd.config.schema import DistillationConfig
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.models.detector import Detector, head_of
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.pairing import Pairing


class QueryCriterion(DistillationCriterion):
    """Adds the distillation losses to those of an RT-DETR.

    An RT-DETR predicts a set of boxes, and no position has a score. So only methods that compare maps can teach it. The
    maps are those that enter its decoder. Ultralytics calls its criterion without the images, adds the values of the
    dictionary that this module returns, and shows three of them alone: `items` has the others.
    """

    items: dict[str, Tensor]  # of the last step, detached, by name

    def begin_step(self, images: Tensor) -> None:
        """Start the teachers as the criterion of a YOLO does, and keep the images for the step."""
        self._images = images
        super().begin_step(images)

    def forward(self, preds: Any, targets: dict[str, Any], **denoising: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the losses of Ultralytics' criterion, and the sum of gain x method(levels) for each method.

        preds, targets, denoising: as Ultralytics' RTDETRDetectionLoss takes them. Its losses are no sums over a batch,
        so neither are those of the methods.
        """
        losses: dict[str, Tensor] = self.base(preds, targets, **denoising)
        batch = {"img": self._images, **targets}
        scaled, self.items = self.distil(torch.stack([*losses.values()]).sum(), None, batch, scale=1)
        names = [f"{method.name}_loss" for method in self.config.method_configs]
        return losses | dict(zip(names, scaled, strict=True))


def make_criterion(
    student: Detector, teachers: Sequence[tuple[Teacher, Pairing]], config: DistillationConfig, seed: int
) -> DistillationCriterion:
    """Return the criterion of a student; the arguments are those of DistillationCriterion."""
    kind = QueryCriterion if isinstance(head_of(student), RTDETRDecoder) else DistillationCriterion
    return kind(student, teachers, config, seed)
