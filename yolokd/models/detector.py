"""Questions about an Ultralytics model: its feature pyramid, what its head detects, and whether it is intact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field, InstanceOf, PositiveInt, ValidationError
from torch import Tensor, nn
from ultralytics.nn.modules.head import OBB, Detect, RTDETRDecoder, WorldDetect, YOLOEDetect
from ultralytics.utils.checks import check_imgsz

from yolokd.data.class_names import ClassNames
from yolokd.errors import UserError, describe_invalid, first_line
from yolokd.pyramid.head import Head

# An Ultralytics model: an nn.Module whose attributes (model, yaml, names, stride) torch's types do not know.
Detector: TypeAlias = Any

INTACT = "give an intact Ultralytics checkpoint of a detector"  # the cure for a model that contradicts itself


@torch.no_grad()
def read_pyramid(model: Detector, argument: str = "model", size: int = 256) -> dict[int, int]:
    """Return {stride: channels} of the maps that enter a detector's head, finest first.

    Runs one forward pass on a square image of `size` pixels, a multiple of every stride, and derives the strides from
    the maps' sizes, so that it works for any family of models. The model's modes are restored.
    Raises UserError, naming `argument`, if the model does not run or has no pyramid.
    """
    maps: list[Tensor] = []

    def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        maps.extend(m for m in inputs[0] if m.ndim == 4)  # YOLOE's head also gets embeddings of classes

    modes = [(m, m.training) for m in model.modules()]
    handle = model.model[-1].register_forward_pre_hook(record)
    channels = image_channels(model)
    try:
        model.eval()(next(model.parameters()).new_zeros(1, channels, size, size))
    except Exception as e:  # whatever the layers of a strange model raise
        raise UserError(argument, f"does not run on an image of {channels} channels: {first_line(e)}", INTACT) from e
    finally:
        handle.remove()
        for module, mode in modes:
            module.training = mode
    if not maps:
        raise UserError(argument, "has no feature maps that enter its head", INTACT)
    return {size // m.shape[-1]: m.shape[1] for m in maps}


# What a model is, in a user's words, by a part of its head's name.
MODEL_KINDS = {
    "semantic": "a semantic segmentation model", "segment": "a segmentation model", "pose": "a pose model",
    "classify": "a classification model", "obb": "a model of rotated boxes", "depth": "a depth model",
    "rtdetr": "an RT-DETR",
    "worlddetect": "a YOLO-World, which is told its classes", "yoloe": "a YOLOE, which is told its classes",
}  # fmt: skip
PROMPTED_HEADS = (WorldDetect, YOLOEDetect)  # heads that get embeddings of the classes beside the maps


def image_channels(model: Detector) -> int:
    """Return how many channels the images of a model have; models of RGB images may leave it out of their .yaml."""
    return int(model.yaml.get("channels", 3))


def head_of(model: Detector) -> nn.Module | None:
    """Return the last layer of a model, or None if it is not a sequence of layers."""
    layers = getattr(model, "model", None)
    return layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None


class ModelYaml(BaseModel):
    """The part of a model's yaml that yolokd reads."""

    channels: Annotated[int, Field(strict=True, ge=1)] = 3


class DetectorAttributes(BaseModel):
    """The attributes that a detector must have beside its layers, and their types; a checkpoint may hold any.

    nc: the number of classes that its head claims. stride: the strides of its pyramid's levels, in pixels.
    """

    model_config = ConfigDict(strict=True)
    names: ClassNames
    nc: PositiveInt
    yaml: ModelYaml
    stride: InstanceOf[Tensor]


def check_detector(model: Detector, argument: str) -> dict[int, int]:
    """Return the feature pyramid of an intact detector, as `read_pyramid` does; raise UserError for any other model.

    Its attributes must have the right types, its head must score the classes that it names, and it must run on an
    image, with the strides that it claims: a file may hold anything.
    """
    check_attributes(model, argument)
    pyramid = read_pyramid(model, argument)
    if isinstance(head_of(model), Detect) and model.stride.tolist() != list(pyramid):
        raise UserError(argument, f"claims the strides {model.stride.tolist()}, but has {list(pyramid)}", INTACT)
    return pyramid


def changing_strides(model: Detector, strides: Iterable[int], freeze: int | Sequence[int | str] | None) -> list[int]:
    """Return the strides at which a training with Ultralytics' `freeze` changes the map that enters the head.

    strides: of these maps, in the head's order. freeze: the number of first layers, or the numbers of the layers, that
    keep their weights. A map changes if one of the layers that it is computed from is trained.
    """
    frozen = {str(layer) for layer in (range(freeze) if isinstance(freeze, int) else freeze or ())}
    changes: list[bool] = []
    for number, layer in enumerate(model.model):
        sources = [number + source if source < 0 else source for source in _sources(layer)]
        if layer is model.model[-1]:
            return [stride for stride, source in zip(strides, sources, strict=False) if changes[source]]
        trained = str(number) not in frozen and any(True for _ in layer.parameters())
        changes.append(trained or any(changes[source] for source in sources if source >= 0))
    return []


def _sources(layer: Any) -> list[int]:
    """Return the numbers of the layers whose outputs a layer of an Ultralytics model takes; below 0, counted back."""
    return [layer.f] if isinstance(layer.f, int) else list(layer.f)


def check_attributes(model: Detector, argument: str) -> None:
    """Raise UserError unless `model` ends in a detection head, and its attributes fit each other; does not run it."""
    head = head_of(model)
    if not isinstance(head, Detect | RTDETRDecoder):
        raise UserError(argument, f"is {describe_kind(model)}, no detector", "give a YOLO or RT-DETR detector")
    values = {name: getattr(model, name, None) for name in ("names", "yaml", "stride")}
    try:
        attributes = DetectorAttributes.model_validate({"nc": getattr(head, "nc", None), **values})
    except ValidationError as e:
        raise UserError(argument, describe_invalid(e), INTACT) from e
    if isinstance(head, PROMPTED_HEADS):  # their scores come from embeddings of the classes
        return
    for channels in class_channels(head):
        if not channels == attributes.nc == len(attributes.names):
            counts = f"{channels} class channels, nc={attributes.nc} and {len(attributes.names)} names"
            raise UserError(argument, f"contradicts itself: {counts}", INTACT)


def class_channels(head: nn.Module) -> Iterator[int]:
    """Yield the number of channels in which each branch of a head scores classes, at each level; 0 if it has none."""
    names = ("dec_score_head",) if isinstance(head, RTDETRDecoder) else ("cv3", "one2one_cv3")
    branches = [branch for name in names if isinstance(branch := getattr(head, name, None), nn.ModuleList)]
    if not branches:
        yield 0
    for level in (level for branch in branches for level in branch):
        layers = [layer for layer in level.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        yield layers[-1].weight.shape[0] if layers else 0


def dense_heads(head: nn.Module | None, strides: Iterable[int]) -> dict[int, Head]:
    """Return the part of a head that is distilled, at each stride; empty if it does not predict at every position.

    Of an end-to-end head this is the one-to-many branch, or the one-to-one branch if fusing has removed the other.
    strides: of the maps that enter the head, in its order.
    """
    if not isinstance(head, Detect) or isinstance(head, PROMPTED_HEADS):
        return {}
    prefix = "" if head.cv3 is not None else "one2one_"
    boxes, classes = getattr(head, f"{prefix}cv2"), getattr(head, f"{prefix}cv3")
    rotated = isinstance(head, OBB)
    return {s: Head(b, c, head.reg_max, rotated=rotated) for s, b, c in zip(strides, boxes, classes, strict=False)}


def describe_kind(model: Detector) -> str:
    """Return what a model is, in a user's words, for example `a segmentation model`."""
    name = type(head_of(model)).__name__.lower()
    return next((kind for part, kind in MODEL_KINDS.items() if part in name), "an unknown kind of model")


def rounded_imgsz(imgsz: object, *models: Detector) -> int:
    """Return `imgsz` as Ultralytics rounds it: a multiple of the models' largest stride, in pixels."""
    largest = max([32, *(int(stride) for model in models for stride in model.stride)])
    return int(check_imgsz(imgsz, stride=largest, floor=largest, max_dim=1))
