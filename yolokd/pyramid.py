"""What teacher and student share: strides of their feature pyramids, and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from math import log2
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolokd.boxes import Labels, inverse_areas
from yolokd.errors import UserError

# An Ultralytics model: an nn.Module whose attributes (model, yaml, names, stride) torch's types do not know.
Detector: TypeAlias = Any


@dataclass(frozen=True)
class LevelShape:
    """One paired level: its stride in pixels, and the channels of both models' maps there.

    stage: which of several teachers it belongs to, counted from 0, the weakest.
    """

    stride: int
    student_channels: int
    teacher_channels: int
    stage: int = 0


@dataclass(eq=False)
class Level:
    """One stride's maps of a batch, on the student's grid.

    student: (B, C_S, H, W), carries gradient. teacher: (B, C_T, H, W), no gradient.
    student_logits, teacher_logits: (B, K, H, W) logits of the K shared classes, or None where no method wants them.
    teacher_mean_logits: the mean of the logits of an end-to-end teacher's two branches; of others the logits; or None.
    student_boxes, teacher_boxes: (B, 4, H, W) predicted distances left, top, right, bottom, in cells, or None.
    labels: the batch's boxes. seed: for what a method draws in this step; the same when a resumed run does it again.
    """

    stride: int
    student: Tensor
    teacher: Tensor
    student_logits: Tensor | None = None
    teacher_logits: Tensor | None = None
    teacher_mean_logits: Tensor | None = None
    student_boxes: Tensor | None = None
    teacher_boxes: Tensor | None = None
    labels: Labels | None = None
    seed: int = 0
    _computed: dict[Hashable, Tensor] = field(default_factory=dict, init=False, repr=False)

    def once(self, key: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` gives, computed for the first of the methods that ask for `key` and shared by the others."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def inverse_areas(self) -> Tensor:
        """`boxes.inverse_areas` of the labels on this level's grid: (B, H, W) float32."""
        labels = self.labels
        assert labels is not None
        b, _, h, w = self.student.shape
        return self.once("inverse areas", lambda: inverse_areas(labels, b, h, w))

    def uniform(self, *size: int) -> Tensor:
        """Random numbers in 0..1, float32, from the step's seed and not from torch's own stream."""
        generator = torch.Generator().manual_seed(hash((self.seed, self.stride)) % 2**63)
        return torch.rand(*size, generator=generator).to(self.student.device)


@dataclass(frozen=True)
class ClassPairing:
    """Which class channels of both heads mean the same; empty where no name is shared.

    With no shared name the highest class score of each model stands in, as a single objectness channel.
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...]

    @property
    def objectness(self) -> bool:
        """Whether no class is shared."""
        return not self.teacher

    @property
    def mapping(self) -> dict[int, int]:
        """{student's class: teacher's class}."""
        return dict(zip(self.student, self.teacher, strict=True))

    def in_words(self, names: Mapping[int, str]) -> str:
        """One line for people. names: of the student's classes."""
        if self.objectness:
            return "classes paired: none shared by name; the highest score of each model is one objectness channel"
        missing = [name for i, name in names.items() if i not in self.student]
        unknown = f"; unknown to the teacher: {_first_ten(missing)}" if missing else ""
        paired = _first_ten([names[i] for i in self.student])
        return f"classes paired: {len(self.student)} of {len(names)} ({paired}){unknown}"

    def of_teacher(self, logits: Tensor) -> Tensor:
        """(B, nc_T, H, W) -> (B, K, H, W)."""
        return _pick(logits, self.teacher)

    def of_student(self, logits: Tensor) -> Tensor:
        """(B, nc_S, H, W) -> (B, K, H, W)."""
        return _pick(logits, self.student)


def _first_ten(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")


def _pick(logits: Tensor, index: tuple[int, ...]) -> Tensor:
    if not index:
        return logits.amax(1, keepdim=True)
    return logits if index == tuple(range(logits.shape[1])) else logits[:, list(index)]


@dataclass(frozen=True)
class Pairing:
    """How a teacher and a student fit: the levels and classes that they share."""

    levels: tuple[LevelShape, ...]
    student_strides: tuple[int, ...]  # of all the student's maps, in the order of its head
    classes: ClassPairing


def level_name(stride: int) -> str:
    """The field's name of a pyramid level.

    >>> level_name(8)
    'P3'
    """
    return f"P{round(log2(stride))}"


def pair_classes(teacher: Mapping[int, str], student: Mapping[int, str]) -> ClassPairing:
    """Pair classes by name, ignoring case and surrounding space, in the student's order.

    Of a teacher's classes of one name the first counts. Raises UserError where two of the data's have one name.

    >>> pair_classes({0: "dog", 1: "Cat "}, {0: "cat", 1: "cow"})
    ClassPairing(teacher=(1,), student=(0,))
    """
    twice = [name for name, count in Counter(map(_normal, student.values())).items() if count > 1]
    if twice:
        raise UserError("data", f"two classes are called {twice[0]!r}", "give each class a name of its own")
    index = {_normal(name): i for i, name in reversed(list(teacher.items()))}
    pairs = [(index[_normal(name)], i) for i, name in student.items() if _normal(name) in index]
    return ClassPairing(tuple(t for t, _ in pairs), tuple(s for _, s in pairs))


def _normal(name: str) -> str:
    return str(name).strip().lower()


def pair_levels(teacher: Mapping[int, int], student: Mapping[int, int]) -> list[LevelShape]:
    """Pair the pyramids, given as {stride: channels}, at the strides that both have, finest first.

    Raises UserError where there is none.

    >>> pair_levels({8: 64, 16: 128}, {4: 16, 8: 32})
    [LevelShape(stride=8, student_channels=32, teacher_channels=64, stage=0)]
    """
    common = sorted(set(teacher) & set(student))
    if not common:
        raise UserError(
            "teacher",
            f"strides {sorted(teacher)} and the student's {sorted(student)} have none in common",
            "choose models whose heads share a stride",
        )
    return [LevelShape(s, student[s], teacher[s]) for s in common]


def on_grid_of(reference: Tensor, maps: Tensor) -> Tensor:
    """Resample `maps` (B, C, h, w) bilinearly to the grid of `reference` (B, *, H, W); untouched where equal."""
    if maps.shape[-2:] == reference.shape[-2:]:
        return maps
    return F.interpolate(maps.float(), size=reference.shape[-2:], mode="bilinear", align_corners=False).to(maps.dtype)


def split_levels(flat: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """Cut a head's (B, C, anchors) output into one (B, C, H, W) per map."""
    sizes = [m.shape[-2] * m.shape[-1] for m in maps]
    parts = torch.split(flat, sizes, dim=-1)
    return [p.view(*p.shape[:2], *m.shape[-2:]) for p, m in zip(parts, maps, strict=True)]


def confidence_shares(logits: Sequence[Tensor]) -> Tensor:
    """(L,) share of each level in the teacher's confidence: the sum over positions of its top class probability."""
    sums = torch.stack([t.float().amax(1).sigmoid().sum() for t in logits])
    return sums / sums.sum()


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
