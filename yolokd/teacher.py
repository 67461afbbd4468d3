"""The teacher: frozen, run once a batch, read at its neck."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect, RTDETRDecoder, WorldDetect, YOLOEDetect

from yolokd.errors import UserError
from yolokd.pyramid import Detector, read_pyramid


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher sees in a batch, by stride: maps (B, C, H, W), and logits (B, nc, H, W) where asked for."""

    maps: dict[int, Tensor]
    logits: dict[int, Tensor]


class Teacher:
    """A frozen detector of any Ultralytics family, read before its head.

    It is no nn.Module, so that neither state_dict, optimizer nor EMA copies of the student ever see it.
    The model given is copied, never changed; its convolutions and batch norms are fused in the copy.

    Raises UserError for a model that detects nothing (a classifier, say).
    """

    def __init__(self, model: Detector) -> None:
        check_detector(model, "teacher")
        model = deepcopy(model).float().eval().requires_grad_(False)
        self.names: dict[int, str] = dict(model.names)
        self.channels: int = model.yaml.get("channels", 3)
        self.pyramid = read_pyramid(model)
        model.end2end = False  # an end-to-end teacher would lose its one-to-many branch when fused
        self.has_logits = _class_branch(model.model[-1]) is not None
        self._tap = _Tap(model.model[-1])
        model.model[-1] = self._tap
        self._model = model.fuse(verbose=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    @torch.no_grad()  # not inference_mode: losses save the maps for backward
    def __call__(self, images: Tensor, logits: bool = False) -> TeacherOutput:
        """Run on (B, channels, H, W) images in 0..1; the class branch of the head runs only if `logits`."""
        maps = self._maps(images)
        branch = self._tap.class_branch if logits else None
        scores = [convs(m) for convs, m in zip(branch, maps, strict=True)] if branch is not None else []
        strides = list(self.pyramid)
        return TeacherOutput(dict(zip(strides, maps, strict=True)), dict(zip(strides, scores, strict=False)))

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The neck maps; images are padded for a teacher with coarser levels than the student's, and the maps cut."""
        height, width = images.shape[-2:]
        coarsest = max(self.pyramid)
        padded = F.pad(images, (0, -width % coarsest, 0, -height % coarsest))
        maps: list[Tensor] = self._model(padded)
        return [m[..., : ceil(height / s), : ceil(width / s)] for m, s in zip(maps, self.pyramid, strict=True)]

    def to(self, device: torch.device) -> Teacher:
        """Move to a device."""
        self._model.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer, for tests that nothing here ever changes."""
        state: dict[str, Tensor] = self._model.state_dict()
        return state


class _Tap(nn.Module):
    """Stands in for the head: returns the neck maps, and keeps the class branch at hand."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.f, self.i = head.f, head.i  # where Ultralytics' forward feeds it from
        self.class_branch = _class_branch(head)

    def forward(self, maps: list[Tensor], *_: object) -> list[Tensor]:
        return list(maps)


def _class_branch(head: Any) -> nn.ModuleList | None:
    """The convolutions that give dense class logits, one per level; None for heads that have none."""
    if not isinstance(head, Detect) or isinstance(head, WorldDetect | YOLOEDetect):
        return None
    branch: nn.ModuleList | None = head.cv3 if head.cv3 is not None else head.one2one_cv3
    return branch


def check_detector(model: Detector, argument: str) -> None:
    """Raise UserError unless `model` ends in a detection head with a feature pyramid."""
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) else None
    if not isinstance(head, Detect | RTDETRDecoder):
        kind = type(head if head is not None else model).__name__
        raise UserError(argument, f"is no detector (its last layer is {kind})", "give a YOLO or RT-DETR detector")
