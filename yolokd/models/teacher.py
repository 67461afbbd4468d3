"""The teacher: frozen, run once a batch, read at its neck."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect

from yolokd.models.detector import PROMPTED_HEADS, Detector, check_detector, read_pyramid
from yolokd.pyramid.boxes import decoded


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher sees in a batch, by stride: maps (B, C, H, W), and logits (B, nc, H, W) where asked for.

    mean_logits: the mean of an end-to-end teacher's two branches, of others the logits, where asked for.
    boxes: (B, 4, H, W) distances left, top, right, bottom, in cells, where asked for.
    """

    maps: dict[int, Tensor]
    logits: dict[int, Tensor]
    mean_logits: dict[int, Tensor]
    boxes: dict[int, Tensor]


@dataclass(frozen=True)
class InferenceSettings:
    """How a teacher runs: precision of weights and maps, memory format, compiled or not, and at what image size.

    imgsz: the longest side in pixels at which it sees a batch; None for that of the student.
    """

    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    compiled: bool = False
    imgsz: int | None = None


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
        model.model[-1] = _Tap(model.model[-1])
        self.settings = InferenceSettings()
        self._model = model.fuse(verbose=False)
        self._forward: Callable[[Tensor], list[Tensor]] = self._model
        self._async_forward = _AsyncForward()

    @property
    def _tap(self) -> _Tap:
        tap: _Tap = self._model.model[-1]
        return tap

    @property
    def has_logits(self) -> bool:
        """Whether its head scores classes at every position."""
        return self._tap.one2many is not None

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    def with_settings(self, settings: InferenceSettings) -> Teacher:
        """The same teacher, run another way; this one stays as it is."""
        other = copy(self)
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        other.settings, other._async_forward = settings, _AsyncForward()
        other._model = deepcopy(self._model).to(dtype=settings.dtype, memory_format=layout)
        other._forward = _compiled(other._model) if settings.compiled else other._model
        return other

    def start(self, images: Tensor, logits: bool = False, mean_logits: bool = False, boxes: bool = False) -> None:
        """On CUDA, run on a stream of its own while the student's forward runs; the next call collects the output."""
        if images.is_cuda:
            self._async_forward.start(images, lambda: self._run(images, logits, mean_logits, boxes))

    def __call__(
        self, images: Tensor, logits: bool = False, mean_logits: bool = False, boxes: bool = False
    ) -> TeacherOutput:
        """Run on (B, channels, H, W) images in 0..1; the branches of its head run only where asked for."""
        return self._async_forward.collect(images) or self._run(images, logits, mean_logits, boxes)

    @torch.no_grad()  # not inference_mode: losses save the maps for backward
    def _run(self, images: Tensor, logits: bool, mean_logits: bool, boxes: bool) -> TeacherOutput:
        # A student trained under autocast must not change the teacher's arithmetic.
        with torch.autocast(images.device.type, enabled=False):
            maps = self._maps(images)
            many = _scores(self._tap.one2many if logits or mean_logits else None, maps)
            one = _scores(self._tap.one2one if mean_logits else None, maps)
            raw = _scores(self._tap.boxes if boxes else None, maps)
            mean = [(m + o) / 2 for m, o in zip(many, one, strict=True)] if one else many
            return TeacherOutput(
                self._by_stride(maps),
                self._by_stride(many if logits else []),
                self._by_stride(mean if mean_logits else []),
                self._by_stride([decoded(r, self._tap.bins) for r in raw]),
            )

    def _by_stride(self, values: list[Tensor]) -> dict[int, Tensor]:
        return dict(zip(self.pyramid, values, strict=False))

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The neck maps; images are padded for a teacher with coarser levels than the student's, and the maps cut."""
        images = self._resized(images)
        height, width = images.shape[-2:]
        coarsest = max(self.pyramid)
        padded = F.pad(images, (0, -width % coarsest, 0, -height % coarsest)).to(self.settings.dtype)
        if self.settings.channels_last:
            padded = padded.contiguous(memory_format=torch.channels_last)
        maps = self._forward(padded)
        return [m[..., : ceil(height / s), : ceil(width / s)] for m, s in zip(maps, self.pyramid, strict=True)]

    def _resized(self, images: Tensor) -> Tensor:
        if self.settings.imgsz is None:
            return images
        scale = self.settings.imgsz / max(images.shape[-2:])
        coarsest = max(
            self.pyramid
        )  # else the last cells would see padding, and the maps would not lie on the student's
        size = [max(round(side * scale / coarsest), 1) * coarsest for side in images.shape[-2:]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=scale < 1)

    def to(self, device: torch.device) -> Teacher:
        """Move to a device."""
        self._model.to(device)
        return self

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer, for tests that nothing here ever changes."""
        state: dict[str, Tensor] = self._model.state_dict()
        return state


class _AsyncForward:
    """One run of a teacher on a CUDA stream of its own, from `start` to `collect`."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._images: Tensor | None = None
        self._output: TeacherOutput | None = None

    def start(self, images: Tensor, run: Callable[[], TeacherOutput]) -> None:
        self._stream = self._stream or torch.cuda.Stream(images.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(self._stream):
            self._images, self._output = images, run()
        images.record_stream(self._stream)  # its memory must not be reused before the teacher has read it

    def collect(self, images: Tensor) -> TeacherOutput | None:
        """The output for these very images, once the current stream waits for it; None where nothing was started."""
        output, self._output = self._output, None
        if self._images is not images:
            output = None
        self._images = None
        if output is None or self._stream is None:
            return None
        current = torch.cuda.current_stream(images.device)
        current.wait_stream(self._stream)
        for values in (output.maps, output.logits, output.mean_logits, output.boxes):
            for tensor in values.values():
                tensor.record_stream(current)  # allocated on the other stream, used on this one
        return output


def _scores(branch: nn.ModuleList | None, maps: list[Tensor]) -> list[Tensor]:
    return [convs(m) for convs, m in zip(branch, maps, strict=True)] if branch is not None else []


def _compiled(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    # Weights never change, so they may be folded into the graph.
    compiled: Callable[[Tensor], list[Tensor]] = torch.compile(model, options={"freezing": True})
    return compiled


class _Tap(nn.Module):
    """Stands in for the head: returns the neck maps, and keeps the head's branches at hand."""

    export = False  # which YOLO-World asks its head

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.f, self.i = head.f, head.i  # where Ultralytics' forward feeds it from
        dense = isinstance(head, Detect) and not isinstance(head, PROMPTED_HEADS)
        one2one = getattr(head, "one2one_cv3", None) if dense else None
        many = head.cv3 if dense else None
        self.one2many: nn.ModuleList | None = many if many is not None else one2one
        self.one2one: nn.ModuleList | None = one2one
        self.bins: int = getattr(head, "reg_max", 1)
        self.boxes: nn.ModuleList | None = None
        if dense:
            self.boxes = head.cv2 if many is not None else getattr(head, "one2one_cv2", None)

    def forward(self, maps: list[Tensor], *_: object) -> list[Tensor]:
        return list(maps)
