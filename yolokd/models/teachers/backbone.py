"""A timm backbone as a teacher of feature maps: a pyramid, or the patch grid of a vision transformer."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from math import ceil, log2
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolokd.config.arguments import did_you_mean
from yolokd.errors import UserError, first_line
from yolokd.models.model_objects import module_hash
from yolokd.models.teachers.teacher import Network, Teacher
from yolokd.runtime.rng import preserve_random_state

PREFIX = "timm:"  # how a teacher that is a backbone is named: timm:NAME, or timm:NAME@FILE with weights of one's own
INSTALL = "pip install 'yolokd[timm]'"
IN_OTHER_PLACES = ("hf-hub:", "hf_hub:", "local-dir:")  # names of models that timm does not list


def is_backbone(teacher: object) -> bool:
    """Return whether a `teacher=` names a timm backbone.

    >>> is_backbone("timm:convnext_tiny"), is_backbone("yolov8l.pt")
    (True, False)
    """
    return isinstance(teacher, str) and teacher.startswith(PREFIX)


def split_backbone(teacher: str) -> tuple[str, str | None]:
    """Return timm's name of a backbone, and the path of its weights; None if timm is to download them.

    >>> split_backbone("timm:convnext_tiny@runs/weights.pth")
    ('convnext_tiny', 'runs/weights.pth')
    """
    name, at, weights = teacher.removeprefix(PREFIX).partition("@")
    return name, weights if at else None


def teacher_name(teacher: str) -> str:
    """Return the name of a teacher's file without the folder; of a timm backbone, `timm:` and the model's name.

    >>> teacher_name("runs/t.pt"), teacher_name("timm:convnext_tiny@runs/weights.pth")
    ('t.pt', 'timm:convnext_tiny')
    """
    return f"{PREFIX}{split_backbone(teacher)[0]}" if is_backbone(teacher) else Path(teacher).name


def with_absolute_weights(teacher: str) -> str:
    """Return a `teacher=` that names a backbone with the absolute path of its weights, if it names a file."""
    name, weights = split_backbone(teacher)
    return teacher if weights is None else f"{PREFIX}{name}@{os.path.abspath(weights)}"


class Backbone(Network):
    """A frozen timm model, which normalizes images as it was trained, and returns its maps, finest first.

    source: its `teacher=`. strides: {stride in pixels: channels} of its maps. is_grid: whether they are one patch grid,
    which is resampled to the levels that it teaches. weights: where they come from. sha256: of the weights.

    Images whose sides are no multiples of the coarsest stride are resized to such. Models that take one size only, such
    as Hiera, see all images in that size.
    """

    names: Mapping[int, str] = {}  # a backbone knows no classes
    mean: Tensor
    std: Tensor

    def __init__(self, source: str, model: Any, strides: Mapping[int, int], is_grid: bool, weights: str) -> None:
        super().__init__()
        self.source, self.strides, self.is_grid, self.weights = source, dict(strides), is_grid, weights
        self.model = model.eval().requires_grad_(False)
        self.size: tuple[int, int] | None = None
        config = model.pretrained_cfg
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(config[name]).view(1, -1, 1, 1), persistent=False)
        self.sha256 = module_hash(model)
        self._fit_size(tuple(config["input_size"][1:]))

    @property
    def multiple(self) -> int:
        """Return what the sides of its images are multiples of, in pixels."""
        return max(self.strides)

    @torch.no_grad()
    def _fit_size(self, trained: tuple[int, int]) -> None:
        """Find out whether the model takes images of any size; if not, all are resized to the size of its training."""
        try:
            self(torch.zeros(1, 3, 2 * self.multiple, 3 * self.multiple))
        except (AssertionError, RuntimeError, ValueError):
            self.size = trained
            self(torch.zeros(1, 3, *trained))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the (B, C, H, W) maps of (B, 3, H, W) images in 0..1."""
        sides = self.size or tuple(ceil(side / self.multiple) * self.multiple for side in images.shape[-2:])
        if sides != tuple(images.shape[-2:]):
            # In float32: CPUs cannot resize in half precision.
            resized = F.interpolate(images.float(), size=sides, mode="bilinear", align_corners=False, antialias=True)
            images = resized.to(images.dtype)
        images = (images - self.mean) / self.std
        if self.is_grid:
            maps: list[Tensor] = self.model.forward_intermediates(
                images, indices=1, norm=True, stop_early=True, output_fmt="NCHW", intermediates_only=True
            )
            return maps
        last = str(getattr(self.model, "output_fmt", "NCHW")).endswith("NHWC")
        return [m.permute(0, 3, 1, 2) if last else m for m in self.model(images)]


def load_backbone(source: str) -> Backbone:
    """Load a timm backbone as `teacher=` names it; runs no code from its weights.

    Raises UserError if timm is not installed, does not know the model, or cannot load its weights.
    """
    argument, (name, weights) = f"teacher={source}", split_backbone(source)
    timm = _import_timm(argument)
    if not name.startswith(IN_OTHER_PLACES) and not timm.is_model(name):
        cure = did_you_mean(name, timm.list_models()) or "timm.list_models() names them"
        raise UserError(argument, f"timm knows no model {name!r}", cure)
    if weights is not None and not Path(weights).is_file():
        raise UserError(argument, f"no such file: {weights}", "give the path of the backbone's weights")
    own = {} if weights is None else {"pretrained_cfg_overlay": {"file": weights}}
    try:
        with preserve_random_state():
            info = _create(timm, name, features_only=True).feature_info
            strides, channels = info.reduction(), info.channels()
            is_grid = len(set(strides)) == 1
            kind = {"num_classes": 0} if is_grid else {"features_only": True}
            torch.manual_seed(0)
            model = _create(timm, name, pretrained=True, **kind, **own)
            if weights is not None:
                torch.manual_seed(1)  # what the file lacks is random, and differs
                if module_hash(_create(timm, name, pretrained=True, **kind, **own)) != module_hash(model):
                    raise ValueError("they lack some of the model's layers")
    except Exception as e:  # whatever timm, its hub and the models raise
        if weights is not None:
            problem = f"its weights do not fit: {type(e).__name__}: {first_line(e)}"
            raise UserError(argument, problem, f"give weights of {name}, as .safetensors or .pth") from e
        cure = f"check name and network, or give weights of your own: {PREFIX}{name}@weights.safetensors"
        raise UserError(argument, f"timm cannot load it: {first_line(e)}", cure) from e
    config = model.pretrained_cfg
    origin = Path(weights).name if weights is not None else str(config.get("hf_hub_id") or config.get("url"))
    pairs = zip(strides[-1:], channels[-1:], strict=True) if is_grid else zip(strides, channels, strict=True)
    return Backbone(source, model, dict(pairs), is_grid, origin)


def _import_timm(argument: str) -> Any:
    try:
        timm = import_module("timm")
    except ModuleNotFoundError as e:
        raise UserError(argument, "needs timm, which is not installed", INSTALL) from e
    logging.getLogger("timm").setLevel(logging.ERROR)
    return timm


def _create(timm: Any, name: str, **keys: Any) -> Any:
    """Build a model of timm, for images of any size if it allows that."""
    try:
        return timm.create_model(name, dynamic_img_size=True, **keys)
    except TypeError:  # convolutional models take any size, and do not know the argument
        return timm.create_model(name, **keys)


def backbone_teacher(
    backbone: Backbone, student_strides: Sequence[int], levels: Sequence[int] | None = None
) -> Teacher:
    """Return a teacher of feature maps alone.

    A patch grid teaches at the student's `levels`; without any, at the one whose stride is closest to that of the
    patches. A pyramid teaches at its own strides.
    """
    if not backbone.is_grid:
        return Teacher(backbone, backbone.strides, {}, 3, backbone.multiple)
    ((patch, channels),) = backbone.strides.items()
    taught = sorted(levels or [min(student_strides, key=lambda stride: abs(log2(stride / patch)))])
    return Teacher(_Repeated(backbone, len(taught)), dict.fromkeys(taught, channels), {}, 3, backbone.multiple)


class _Repeated(Network):
    """Returns the one map of a backbone for each level; the comparison resamples it to the level's grid."""

    def __init__(self, backbone: Backbone, levels: int) -> None:
        super().__init__()
        self.backbone, self.levels = backbone, levels

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.backbone(images) * self.levels  # type: ignore[no-any-return]
