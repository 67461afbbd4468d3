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


# What a model is, in a user's words, by a part of its head's name.
KINDS = {
    "semantic": "a semantic segmentation model", "segment": "a segmentation model", "pose": "a pose model",
    "classify": "a classification model", "obb": "a model of rotated boxes", "depth": "a depth model",
    "rtdetr": "an RT-DETR",
    "worlddetect": "a YOLO-World, which is told its classes", "yoloe": "a YOLOE, which is told its classes",
}  # fmt: skip
PROMPTED_HEADS = (WorldDetect, YOLOEDetect)  # heads that get embeddings of the classes beside the maps


def head_of(model: Detector) -> nn.Module | None:
    """Return the last layer of a model, or None if it is not a sequence of layers."""
    layers = getattr(model, "model", None)
    return layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None


def check_detector(model: Detector, argument: str) -> None:
    """Raise UserError unless `model` ends in a detection head with a feature pyramid."""
    if not isinstance(head_of(model), Detect | RTDETRDecoder):
        raise UserError(argument, f"is {describe_kind(model)}, no detector", "give a YOLO or RT-DETR detector")


def describe_kind(model: Detector) -> str:
    """Return what a model is, in a user's words, for example `a segmentation model`."""
    name = type(head_of(model)).__name__.lower()
    return next((kind for part, kind in KINDS.items() if part in name), "an unknown kind of model")


def only_detects(model: Detector) -> bool:
    """Return whether a model only detects (no segments, poses, …), so that the detection validator can score it."""
    return not isinstance(model.model[-1], Segment | YOLOESegment | Pose | OBB)
