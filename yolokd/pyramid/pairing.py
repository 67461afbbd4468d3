"""The pairing of a teacher and a student: the pyramid levels and classes that both have."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolokd.errors import UserError
from yolokd.pyramid.head import HeadShape
from yolokd.pyramid.level import LevelShape


@dataclass(frozen=True)
class ClassPairing:
    """The class channels of both heads that mean the same.

    student: the K shared classes' indices in the student's head. teacher: for each, the indices of the teacher's
    classes that mean it: one, or several with `classes_map=`, of which the highest score counts. Both are empty if no
    class is shared. The highest class score of each model then serves as a single objectness channel (K = 1).
    """

    teacher: tuple[tuple[int, ...], ...]
    student: tuple[int, ...]

    @property
    def objectness(self) -> bool:
        """Return whether no class is shared, so that objectness is compared instead."""
        return not self.teacher

    @property
    def mapping(self) -> dict[int, tuple[int, ...]]:
        """Return {index of a student's class: indices of the teacher's classes that mean it}."""
        return dict(zip(self.student, self.teacher, strict=True))

    def describe(self, names: Mapping[int, str], teacher_names: Mapping[int, str]) -> str:
        """Return a line for the log. names, teacher_names: the student's and the teacher's classes by index."""
        if not teacher_names:
            return "classes paired: none, since the teacher is a backbone: it teaches feature maps alone"
        if self.objectness:
            return "classes paired: none shared by name; the highest score of each model is one objectness channel"
        missing = [name for i, name in names.items() if i not in self.student]
        unknown = f"; unknown to the teacher: {_first_ten(missing)}" if missing else ""
        paired = _first_ten([_pair(names[i], [teacher_names[t] for t in group]) for i, group in self.mapping.items()])
        return f"classes paired: {len(self.student)} of {len(names)} ({paired}){unknown}"


class ClassSelection(nn.Module):
    """Selects the logits of the shared classes from those of one head: (B, nc, H, W) -> (B, K, H, W).

    classes: K indices in the head, or groups of indices. Of a group, the highest logit of each position is selected;
    without any classes, the highest of all.
    """

    index: Tensor  # (K · size,) moves with the module to the device, so that no step has to copy it there

    def __init__(self, classes: Sequence[int | Sequence[int]]) -> None:
        super().__init__()
        groups = [(group,) if isinstance(group, int) else tuple(group) for group in classes]
        self._size = max(map(len, groups), default=1)
        # Smaller groups repeat their first class, which does not change the highest logit.
        self._index = tuple(i for group in groups for i in group + group[:1] * (self._size - len(group)))
        self.register_buffer("index", torch.tensor(self._index, dtype=torch.long), persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        """Return the selected logits."""
        if not self._index:
            return logits.amax(1, keepdim=True)
        if self._size == 1 and self._index == tuple(range(logits.shape[1])):
            return logits
        selected = logits.index_select(1, self.index)
        if self._size == 1:
            return selected
        return selected.view(len(logits), -1, self._size, *logits.shape[2:]).amax(2)


def _pair(name: str, teacher_names: Sequence[str]) -> str:
    """Return a student's class with those of the teacher that mean it; its name alone if that is what they share."""
    same = [_normalize(other) for other in teacher_names] == [_normalize(name)]
    return name if same else f"{name} = {' or '.join(teacher_names)}"


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


def pair_classes(
    teacher: Mapping[int, str], student: Mapping[int, str], classes_map: Mapping[str, str] | None = None
) -> ClassPairing:
    """Return the pairing of two models' classes, {index: name}, in the student's order.

    classes_map: {a teacher's class: the student's class that it means}; all other classes are paired by name. Names
    that the teacher does not have are left out.
    Case and surrounding space are ignored. If several of the teacher's classes have the same name, the first is paired.
    Raises UserError if two of the student's classes, which are the data set's, have the same name, or if the map names
    a class of the teacher twice.

    >>> pair_classes({0: "dog", 1: "Cat "}, {0: "cat", 1: "cow"})
    ClassPairing(teacher=((1,),), student=(0,))
    >>> pair_classes({0: "dog", 1: "cat"}, {0: "cow", 1: "pet"}, {"dog": "pet", "cat": "pet"})
    ClassPairing(teacher=((0, 1),), student=(1,))
    """
    duplicates = [name for name, count in Counter(map(_normalize, student.values())).items() if count > 1]
    if duplicates:
        raise UserError("data", f"two classes are called {duplicates[0]!r}", "give each class a name of its own")
    given = classes_map or {}
    meanings = {_normalize(name): _normalize(meaning) for name, meaning in given.items()}
    if len(meanings) < len(given):
        raise UserError(f"classes_map={dict(given)}", "names a class of the teacher twice", "name each once")
    index = {_normalize(name): i for i, name in reversed(list(teacher.items()))}
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for name, i in index.items():
        groups[meanings.get(name, name)].append(i)
    pairs = [(tuple(sorted(groups[name])), i) for i, n in student.items() if (name := _normalize(n)) in groups]
    return ClassPairing(tuple(t for t, _ in pairs), tuple(s for _, s in pairs))


def unknown_names(asked: Iterable[str], names: Iterable[str]) -> list[str]:
    """Return those of the names asked for that none of `names` equals, as `pair_classes` compares them.

    >>> unknown_names(["Dog", "cow"], ["dog", "cat"])
    ['cow']
    """
    known = set(map(_normalize, names))
    return [name for name in asked if _normalize(name) not in known]


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
            "choose models with maps at a common stride",
        )
    strides = tuple(sorted(student))
    return [
        LevelShape(s, student[s], teacher[s], 0, strides, student_heads.get(s), teacher_heads.get(s)) for s in common
    ]


def choose_levels(levels: Sequence[LevelShape], wanted: Sequence[int] | None) -> tuple[LevelShape, ...]:
    """Return the levels that are distilled: those of the strides `wanted`, in pixels, or all for None.

    Raises UserError for a stride that one of the models lacks.
    """
    if wanted is None:
        return tuple(levels)
    shared = [shape.stride for shape in levels]
    if unknown := [stride for stride in wanted if stride not in shared]:
        problem = f"teacher and student do not both have a level of stride {unknown[0]}"
        raise UserError(f"levels={list(wanted)}", problem, f"their strides: {', '.join(map(str, shared))}")
    return tuple(shape for shape in levels if shape.stride in wanted)
