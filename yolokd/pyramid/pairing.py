"""What teacher and student share: strides of their feature pyramids, and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from yolokd.errors import UserError
from yolokd.pyramid.level import LevelShape


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

    def describe(self, names: Mapping[int, str]) -> str:
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
