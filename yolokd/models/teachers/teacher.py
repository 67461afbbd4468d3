"""The teacher: a frozen network that returns its maps and, if requested, its predictions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolokd.models.channels import seen_channels, select_channels
from yolokd.models.teachers.cuda_graphs import CudaGraphs
from yolokd.models.teachers.outputs import MAPS_ONLY, RequestedOutputs, TeacherOutput
from yolokd.models.teachers.side_stream import SideStream
from yolokd.pyramid.boxes import decode_distances
from yolokd.pyramid.head import Head


@dataclass(frozen=True)
class InferenceSettings:
    """How a teacher runs: the precision of weights and maps, the memory format, compilation, and the image size.

    compiled_for: the shape (B, C, H, W) of the batches that a compiled model runs on; others run uncompiled, because
    each new shape would be compiled anew. graph_for: the shape of the batches that run as a CUDA graph, see CudaGraphs;
    on other devices it means nothing. imgsz: the longest side in pixels to which a batch is resized for the teacher;
    None for the student's size.
    """

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    compiled_for: tuple[int, ...] | None = None
    graph_for: tuple[int, ...] | None = None
    imgsz: int | None = None


class Branches(nn.Module):
    """The layers of a teacher's head that predict at every position, each None if the head lacks it.

    one2many, one2one: class scores per level. boxes: raw box distances per level, in `bins` bins per side.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one2many: nn.ModuleList | None = None
        self.one2one: nn.ModuleList | None = None
        self.boxes: nn.ModuleList | None = None
        self.bins = 1


class Network(nn.Module):
    """Runs inside a Teacher: `forward` returns the maps of (B, C, H, W) images in 0..1, finest first.

    branches: those of its head.
    """

    @property
    def branches(self) -> Branches:
        """Return the branches, which a subclass with a head has; they are submodules of it."""
        return Branches()


class Teacher:
    """A frozen network that gives maps and, if it has a head that predicts at every position, predictions.

    `tapped_detector.detector_teacher` makes one from an Ultralytics detector, `backbone.backbone_teacher` from a timm
    backbone. Several of them can teach together, see `distillation.predictions`.

    pyramid: {stride in pixels: channels} of the maps, in the order of the network's. names: its classes by index.
    channels: of the images. multiple: in pixels; images that `imgsz` resizes get sides that are multiples of this.
    heads: the frozen head at each stride, as functions of a map, in float32 in all copies of the teacher: methods send
    gradients through them, which would underflow in float16. Empty if the head does not predict at every position.

    It is not an nn.Module, so that it stays out of the student's state_dict, optimizer and EMA copies.
    """

    def __init__(
        self,
        network: Network,
        pyramid: Mapping[int, int],
        names: Mapping[int, str],
        channels: int,
        multiple: int,
        heads: Mapping[int, Head] = {},
    ) -> None:
        self.pyramid, self.names, self.channels, self.heads = dict(pyramid), dict(names), channels, dict(heads)
        self.settings = InferenceSettings()
        self.image_channels: tuple[int, ...] | None = None  # those of the images that it sees, from 0; None: all
        # Any: for torch's types, copies of a module lack `branches`.
        self._model: Any = network.eval().requires_grad_(False)
        self._multiple = multiple
        self._compiled: Callable[[Tensor], list[Tensor]] = self._model
        self._side_stream, self._graphs = SideStream(), CudaGraphs()

    @property
    def has_logits(self) -> bool:
        """Return whether the head scores classes at every position."""
        return bool(self.heads)

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def with_settings(self, settings: InferenceSettings) -> Teacher:
        """Return a copy of the teacher that runs with other settings."""
        other = copy(self)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        other.settings, other._side_stream, other._graphs = settings, SideStream(), CudaGraphs()
        other._model = deepcopy(self._model).to(dtype=settings.dtype, memory_format=layout)
        other._compiled = _compiled(other._model) if settings.compiled_for is not None else other._model
        return other

    def for_images(self, channels: int, chosen: Sequence[int] | None = None) -> Teacher:
        """Return a copy of the teacher that sees those channels of images which `seen_channels` says."""
        other = copy(self)
        other.image_channels = seen_channels(self.channels, channels, chosen)
        return other

    def start(self, images: Tensor, requested: RequestedOutputs = MAPS_ONLY) -> None:
        """Start on CUDA, so that the teacher runs on its own stream during the student's forward; does nothing on CPUs.

        The next call with the same `images` returns the output; `requested` must be the same.
        """
        if images.is_cuda:
            self._side_stream.start(images, lambda: self._run(images, requested))

    def __call__(self, images: Tensor, requested: RequestedOutputs = MAPS_ONLY) -> TeacherOutput:
        """Return the output for (B, channels, H, W) images in 0..1, or collect it if `start` was called with them."""
        return self._side_stream.collect(images) or self._run(images, requested)

    def _run(self, images: Tensor, requested: RequestedOutputs) -> TeacherOutput:
        if images.is_cuda and images.shape == self.settings.graph_for:
            return self._graphs.replay(requested, lambda batch: self._forward(batch, requested), images)
        return self._forward(images, requested)

    @torch.no_grad()  # not inference_mode: losses save the maps for backward
    def _forward(self, images: Tensor, requested: RequestedOutputs) -> TeacherOutput:
        # A student trained under autocast must not change the teacher's arithmetic.
        with torch.autocast(images.device.type, enabled=False):
            maps = self._maps(images)
            branches, needs_logits = self._model.branches, requested.logits or requested.mean_logits
            one2many = _branch_outputs(branches.one2many if needs_logits else None, maps)
            one2one = _branch_outputs(branches.one2one if requested.mean_logits else None, maps)
            raw_boxes = _branch_outputs(branches.boxes if requested.boxes or requested.box_logits else None, maps)
            boxes = [decode_distances(raw, branches.bins) for raw in raw_boxes] if requested.boxes else []
            mean = [(m + o) / 2 for m, o in zip(one2many, one2one, strict=True)] if one2one else one2many
            return TeacherOutput(
                maps=self._by_stride(maps),
                logits=self._by_stride(one2many if requested.logits else []),
                mean_logits=self._by_stride(mean if requested.mean_logits else []),
                boxes=self._by_stride(boxes),
                box_logits=self._by_stride(raw_boxes if requested.box_logits else []),
            )

    def _by_stride(self, values: list[Tensor]) -> dict[int, Tensor]:
        return dict(zip(self.pyramid, values, strict=False))

    def _maps(self, images: Tensor) -> list[Tensor]:
        forward = self._compiled if images.shape == self.settings.compiled_for else self._model
        layout = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        seen = self._resized(select_channels(images, self.image_channels))
        maps: list[Tensor] = forward(seen.to(self.settings.dtype, memory_format=layout))
        return maps

    def _resized(self, images: Tensor) -> Tensor:
        if self.settings.imgsz is None:
            return images
        scale = self.settings.imgsz / max(images.shape[-2:])
        # Multiples of the coarsest stride need no padding, so that the maps cover the same area as the student's.
        size = [max(round(side * scale / self._multiple), 1) * self._multiple for side in images.shape[-2:]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)

    def discard_pending(self) -> None:
        """Free the output of a `start` that no call will collect."""
        self._side_stream.discard()

    def forget_graphs(self) -> None:
        """Free the memory of recorded CUDA graphs: batches will have another size."""
        self._graphs = CudaGraphs()

    def to(self, device: torch.device) -> Teacher:
        """Move the teacher to a device, and return it."""
        self._model.to(device)
        for head in self.heads.values():
            head.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Return every parameter and buffer; tests check that none of them ever changes."""
        state: dict[str, Tensor] = self._model.state_dict()
        return state


def _branch_outputs(branch: nn.ModuleList | None, maps: list[Tensor]) -> list[Tensor]:
    """Return the output of a head's branch at each level; nothing if there is no branch."""
    return [convs(m) for convs, m in zip(branch, maps, strict=True)] if branch is not None else []


def _compiled(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    # Weights never change, so they may be folded into the graph; the shape of its input does not change either.
    compiled: Callable[[Tensor], list[Tensor]] = torch.compile(model, dynamic=False, options={"freezing": True})
    return compiled
