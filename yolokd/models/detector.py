"""Questions about an Ultralytics model: its feature pyramid, and what its head detects."""

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
    """Return {stride: channels} of the maps that enter a detector's head, finest first.

    Runs one forward pass on a square image of `size` pixels, a multiple of every stride, and derives the strides from
    the maps' sizes, so that it works for any family of models. The model's modes are restored.
    """
    maps: list[Tensor] = []

    def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        maps.extend(m for m in inputs[0] if m.ndim == 4)  # YOLOE's head also gets embeddings of classes

    head = model.model[-1]
    modes = [(m, m.training) for m in model.modules()]
    handle = head.register_forward_pre_hook(record)
    try:
        parameter = next(model.parameters())
        channels = model.yaml.get("channels", 3)
        model.eval()(parameter.new_zeros(1, channels, size, size))
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    return {size // m.shape[-1]: m.shape[1] for m in maps}


PROMPTED_HEADS = (WorldDetect, YOLOEDetect)  # heads that get embeddings of the classes beside the maps


def check_detector(model: Detector, argument: str) -> None:
    """Raise UserError unless `model` ends in a detection head with a feature pyramid."""
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) else None
    if not isinstance(head, Detect | RTDETRDecoder):
        kind = type(head if head is not None else model).__name__
        raise UserError(argument, f"is not a detector (its last layer is {kind})", "give a YOLO or RT-DETR detector")


def only_detects(model: Detector) -> bool:
    """Return whether a model only detects (no segments, poses, …), so that the detection validator can score it."""
    return not isinstance(model.model[-1], Segment | YOLOESegment | Pose | OBB)
