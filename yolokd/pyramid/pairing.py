"""The pairing of a teacher and a student: the pyramid levels and classes that both have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolokd.errors import UserError
from yolokd.pyramid.head import HeadShape
from yolokd.pyramid.level import LevelShape


@dataclass(frozen=True)
class ClassPairing:
    """The class channels of both heads that mean the same.

    teacher, student: the K shared classes' indices in each head, in the same order; empty if no class name is shared.
    The highest class score of each model then serves as a single objectness channel (K = 1).
    """

    teacher: tuple[int, ...]
    student: tuple[int, ...]

    @property
    def objectness(self) -> bool:
        """Return whether no class is shared, so that objectness is compared instead."""
        return not self.teacher

    @property
    def mapping(self) -> dict[int, int]:
        """Return {index of a student's class: index of the teacher's class of that name}."""
        return dict(zip(self.student, self.teacher, strict=True))

    def describe(self, names: Mapping[int, str]) -> str:
        """Return a line for the log. names: the student's classes by index."""
        if self.objectness:
            return "classes paired: none shared by name; the highest score of each model is one objectness channel"
        missing = [name for i, name in names.items() if i not in self.student]
        unknown = f"; unknown to the teacher: {_first_ten(missing)}" if missing else ""
        paired = _first_ten([names[i] for i in self.student])
        return f"classes paired: {len(self.student)} of {len(names)} ({paired}){unknown}"


class ClassSelection(nn.Module):
    """Selects the logits of the shared classes from those of one head: (B, nc, H, W) -> (B, K, H, W).

    classes: their indices in the head; if there are none, the highest logit of each position is selected.
    """

    index: Tensor  # moves with the module to the device, so that no step has to copy it there

    def __init__(self, classes: Sequence[int]) -> None:
        super().__init__()
        self._classes = tuple(classes)
        self.register_buffer("index", torch.tensor(self._classes, dtype=torch.long), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Return the selected logits."""
        if not self._classes:
            return logits.amax(1, keepdim=True)
        every = self._classes == tuple(range(logits.shape[1]))
        return logits if every else logits.index_select(1, self.index)


def _first_ten(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (" …" if len(names) > 10 else "")


@dataclass(frozen=True)
class Pairing:
    """The levels and classes that a teacher and a student share.

    student_strides: of all the student's maps, in the order of its head, in pixels.
    """

    levels: tuple[LevelShape, ...]
    student_strides: tuple[int, ...]
    classes: ClassPairing


def pair_classes(teacher: Mapping[int, str], student: Mapping[int, str]) -> ClassPairing:
    """Return the pairing of two models' classes, {index: name}, by name, in the student's order.

    Case and surrounding space are ignored. If several of the teacher's classes have the same name, the first is paired.
    Raises UserError if two of the student's classes, which are the data set's, have the same name.

    >>> pair_classes({0: "dog", 1: "Cat "}, {0: "cat", 1: "cow"})
    ClassPairing(teacher=(1,), student=(0,))
    """
    duplicates = [name for name, count in Counter(map(_normalize, student.values())).items() if count > 1]
    if duplicates:
        raise UserError("data", f"two classes are called {duplicates[0]!r}", "give each class a name of its own")
    index = {_normalize(name): i for i, name in reversed(list(teacher.items()))}
    pairs = [(index[_normalize(name)], i) for i, name in student.items() if _normalize(name) in index]
    return ClassPairing(tuple(t for t, _ in pairs), tuple(s for _, s in pairs))


def _normalize(name: str) -> str:
    return str(name).strip().lower()


def pair_levels(
    teacher: Mapping[int, int],
    student: Mapping[int, int],
    teacher_heads: Mapping[int, HeadShape] = {},
    student_heads: Mapping[int, HeadShape] = {},
) -> list[LevelShape]:
    """Return the levels at the strides that both models have, finest first.

    teacher, student: {stride in pixels: channels}. teacher_heads, student_heads: {stride: shape of the head there}.
    Raises UserError if the models have no stride in common.

    >>> [level.stride for level in pair_levels({8: 64, 16: 128}, {4: 16, 8: 32})]
    [8]
    """
    common = sorted(set(teacher) & set(student))
    if not common:
        raise UserError(
            "teacher",
            f"strides {sorted(teacher)} and the student's {sorted(student)} have none in common",
            "choose models whose heads share a stride",
        )
    strides = tuple(sorted(student))
    return [
        LevelShape(s, student[s], teacher[s], 0, strides, student_heads.get(s), teacher_heads.get(s)) for s in common
    ]
