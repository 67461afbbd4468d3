"""What yolokd needs to know of an Ultralytics model."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import (
    OBB,
    Detect,
    Pose,
    RTDETRDecoder,
    Segment,
    WorldDetect,
    YOLOEDetect,
    YOLOESegment,
)

from yolokd.errors import UserError

# An Ultralytics model: an nn.Module whose attributes (model, yaml, names, stride) torch's types do not know.
Detector: TypeAlias = Any


@torch.no_grad()
def read_pyramid(model: Detector, size: int = 256) -> dict[int, int]:
    """{stride: channels} of the maps that enter a detector's last layer, finest first, read off one forward pass.

    Works for any family: strides come from the maps' sizes. `size` (pixels) must be a multiple of every stride.
    """
    seen: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.extend(m for m in inputs[0] if m.ndim == 4)  # YOLOE's head is given embeddings of classes, too

    head = model.model[-1]
    modes = [(m, m.training) for m in model.modules()]
    handle = head.register_forward_pre_hook(keep)
    try:
        parameter = next(model.parameters())
        channels = model.yaml.get("channels", 3)
        model.eval()(parameter.new_zeros(1, channels, size, size))
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return {size // m.shape[-1]: m.shape[1] for m in seen}


PROMPTED_HEADS = (WorldDetect, YOLOEDetect)  # heads that are given embeddings of the classes beside the maps


def check_detector(model: Detector, argument: str) -> None:
    """Raise UserError unless `model` ends in a detection head with a feature pyramid."""
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) else None
    if not isinstance(head, Detect | RTDETRDecoder):
        kind = type(head if head is not None else model).__name__
        raise UserError(argument, f"is no detector (its last layer is {kind})", "give a YOLO or RT-DETR detector")


def only_detects(model: Detector) -> bool:
    """Whether a model does nothing beyond detecting (segments, …), which Ultralytics' detection validator can score."""
    return not isinstance(model.model[-1], Segment | YOLOESegment | Pose | OBB)
