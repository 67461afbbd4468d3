"""A detector as a teacher: its maps are taken where they enter the head, and branches of the head run on request."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from math import ceil
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from yolokd.models.detector import Detector, check_detector, dense_heads, image_channels
from yolokd.models.teachers.teacher import Branches, Network, Teacher
from yolokd.pyramid.head import Head


def detector_teacher(model: Detector, argument: str = "teacher") -> Teacher:
    """Return a teacher of any Ultralytics family.

    The given model is copied, never changed; convolutions and batch norms are fused in the copy.
    Raises UserError, naming `argument`, for a model that is not an intact detector, such as a classifier.
    """
    model = deepcopy(model).float().eval().requires_grad_(False)
    pyramid = check_detector(model, argument)
    model.end2end = False  # otherwise fusing removes the one-to-many branch of an end-to-end teacher
    heads = dense_heads(model.model[-1], pyramid)
    model.model[-1] = _Tap(model.model[-1], heads)
    network = _TappedDetector(model.fuse(verbose=False), tuple(pyramid))
    return Teacher(network, pyramid, model.names, image_channels(model), max(pyramid), heads)


class _TappedDetector(Network):
    """Runs a detector whose head is replaced by a tap.

    Images are padded to multiples of the coarsest stride, and the maps are cut to match.
    """

    def __init__(self, model: Detector, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.strides = model, strides

    @property
    def branches(self) -> Branches:
        tap: Branches = self.model.model[-1]
        return tap

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        coarsest = max(self.strides)
        padding = (0, -width % coarsest, 0, -height % coarsest)
        maps = self.model(F.pad(images, padding) if any(padding) else images)
        return [m[..., : ceil(height / s), : ceil(width / s)] for m, s in zip(maps, self.strides, strict=True)]


class _Tap(Branches):
    """Replaces the teacher's head: its forward returns the neck maps that enter it and runs no branch."""

    export = False  # YOLO-World reads this attribute of its head

    def __init__(self, head: Any, heads: Mapping[int, Head]) -> None:
        super().__init__()
        self.f, self.i = head.f, head.i  # Ultralytics' forward reads from these which layers feed it
        self.bins = getattr(head, "reg_max", 1)
        if heads:
            self.one2many = nn.ModuleList(h.class_layers for h in heads.values())
            self.one2one = getattr(head, "one2one_cv3", None)
            self.boxes = nn.ModuleList(h.box_layers for h in heads.values())

    def forward(self, maps: list[Tensor], *_: object) -> list[Tensor]:
        return list(maps)
