"""The parts of a report that show images: what the models find in them, and their maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from yolokd.report.pictures import GROUPS, Layer, MapGroup, gradient, layers, paths, summarize
from yolokd.report.seen.detections import Mask, differences
from yolokd.report.seen.maps import LevelMaps, Observation
from yolokd.report.seen.samples import NO_BOXES, Boxes, Frame, Sample

COLORS = 8  # of classes, in the page's style sheet


@dataclass(frozen=True)
class Drawn:
    """An object over a photograph: the data of its SVG path, the classes of CSS that draw it, what a pointer shows."""

    path: str
    style: str
    hint: str


@dataclass(frozen=True)
class Panel:
    """A photograph with objects drawn over it: its heading, a line below it, and the objects."""

    heading: str
    count: str
    objects: Sequence[Drawn]


@dataclass(frozen=True)
class Strip:
    """The maps of one image at one level."""

    image: int
    tiles: Sequence[Layer]


@dataclass(frozen=True)
class LevelView:
    """The maps of a group at one level: a strip for each image, and a sentence that sums them up."""

    level: str
    strips: Sequence[Strip]
    summary: str


@dataclass(frozen=True)
class GroupView:
    """A group of maps at each level. used: whether the run's method is the one whose idea they show."""

    group: MapGroup
    gradient: str
    used: bool
    levels: Sequence[LevelView]


class Found:
    """Holds what teacher and student find in images, and how it differs.

    teacher: None for a run without one. objectness: whether classes do not count, because the models share none.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        names: Mapping[int, str],
        teacher: Sequence[Boxes] | None,
        student: Sequence[Boxes],
        objectness: bool,
    ) -> None:
        self._samples, self._names, self._teacher, self._student = samples, names, teacher, student
        references = [NO_BOXES] * len(samples) if teacher is None else teacher
        self._differences = [
            differences(sample.labels, reference, found, objectness)
            for sample, reference, found in zip(samples, references, student, strict=True)
        ]

    @property
    def summary(self) -> str:
        """Return one sentence on all images."""
        objects = sum(len(sample.labels) for sample in self._samples)
        models = [("student", "student_right")] if self._teacher is None else [*zip(MODELS, RIGHT, strict=True)]
        masks = {name: np.concatenate([getattr(d, right) for d in self._differences]) for name, right in models}
        found = " and ".join(f"the {name} finds {mask.sum()}" for name, mask in masks.items())
        wrong = " and ".join(f"{(~mask).sum()} of the {name}" for name, mask in masks.items())
        return f"Of {objects} labelled objects in these images, {found}. Boxes without a labelled object: {wrong}."

    def panels(self, image: int, frame: Frame) -> list[Panel]:
        """Return the panels of an image: labels, teacher if there is one, student, and what differs."""
        labels, student, d = self._samples[image].labels, self._student[image], self._differences[image]
        panels = [Panel("labels", _objects(len(labels)), self._by_class(labels, frame))]
        if self._teacher is not None:
            teacher = self._teacher[image]
            panels.append(Panel("teacher", _found(d.teacher_right), self._by_class(teacher, frame)))
        panels.append(Panel("student", _found(d.student_right), self._by_class(student, frame)))
        return [*panels, self._difference_panel(image, frame)]

    def _by_class(self, boxes: Boxes, frame: Frame) -> list[Drawn]:
        hints = self._hints(boxes)
        styles = [f"k{label % COLORS}" if label >= 0 else "kx" for label in boxes.classes.tolist()]
        return [Drawn(*each) for each in zip(paths(boxes, frame), styles, hints, strict=True)]

    def _difference_panel(self, image: int, frame: Frame) -> Panel:
        """Return boxes that one model alone finds, labels that none finds and, drawn thin, the boxes of both."""
        d, labels, student = self._differences[image], self._samples[image].labels, self._student[image]
        parts: list[tuple[Boxes, Mask, Mask | None, str]]
        if self._teacher is None:
            parts = [(labels, ~d.labels_found, None, "only-teacher"), (student, d.student_right, None, "shared")]
            parts.append((student, ~d.student_right, d.student_right, "only-student"))
            return self._panel_of(parts, frame, f"{_objects(int((~d.labels_found).sum()))} missed")
        teacher = self._teacher[image]
        parts = [
            (student, d.student_shared, None, "shared"),
            (labels, ~d.labels_found, None, "missed"),
            (teacher, ~d.teacher_shared, d.teacher_right, "only-teacher"),
            (student, ~d.student_shared, d.student_right, "only-student"),
        ]
        alone = (~d.teacher_shared).sum(), (~d.student_shared).sum()
        return self._panel_of(parts, frame, f"teacher alone {alone[0]}, student alone {alone[1]}")

    def _panel_of(self, parts: Sequence[tuple[Boxes, Mask, Mask | None, str]], frame: Frame, count: str) -> Panel:
        """Return a panel of boxes: those in the first mask, drawn as wrong if they are not in the second one."""
        drawn = []
        for boxes, shown, right, style in parts:
            each = zip(paths(boxes, frame), self._hints(boxes), shown, strict=True)
            for i, (path, hint, is_shown) in enumerate(each):
                if is_shown:
                    wrong = " wrong" if right is not None and not right[i] else ""
                    drawn.append(Drawn(path, style + wrong, hint))
        return Panel("what differs", count, drawn)

    def _hints(self, boxes: Boxes) -> list[str]:
        """Return the class of each box with its score; of a label, the class alone."""
        pairs = zip(boxes.classes.tolist(), boxes.scores.tolist(), strict=True)
        names = [(self._names.get(label, "another class"), score) for label, score in pairs]
        return [name if score == 1 else f"{name} {score:.2f}" for name, score in names]


MODELS, RIGHT = ("teacher", "student"), ("teacher_right", "student_right")


def _objects(count: int) -> str:
    return f"{count} object{'s' if count != 1 else ''}"


def _found(right: Mask) -> str:
    wrong = int((~right).sum())
    return f"finds {right.sum()}" + (f", {wrong} wrong" if wrong else "")


def group_views(
    after: Observation, before: LevelMaps, levels: Sequence[str], methods: Sequence[str]
) -> list[GroupView]:
    """Return each group of maps that there are, at some levels. methods: of the run."""
    views = []
    for group in GROUPS:
        if not any(name in after.maps[level] for level in levels for name in group.maps):
            continue
        shown = []
        for level in levels:
            count = len(next(iter(after.maps[level].values())))
            strips = [Strip(image, layers(group, after.maps, before, level, image)) for image in range(count)]
            shown.append(LevelView(level, strips, summarize(group, after.maps, before, level)))
        views.append(GroupView(group, gradient(group.colors), group.method in methods, shown))
    return views
