"""Maps of what both models attend to and where they disagree, computed by the methods' own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from yolokd.config.defaults import method_defaults
from yolokd.methods.blocks import spatial_attention
from yolokd.methods.features.dfd import above_mean, disparity
from yolokd.methods.features.frs import richness
from yolokd.methods.features.pdf import class_disagreement
from yolokd.models.detector import Detector
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.models.teachers.teacher import InferenceSettings, Teacher
from yolokd.pyramid.level import Level, confidence_shares, level_name, resize_to
from yolokd.pyramid.pairing import ClassPairing, ClassSelection
from yolokd.report.seen.samples import Sample, as_images
from yolokd.runtime.rng import preserve_random_state

Array = npt.NDArray[np.float32]
LevelMaps = dict[str, dict[str, Array]]  # {name of a level: {name of a map: (images, H, W)}}


@dataclass(frozen=True)
class MapKind:
    """A map of a level: which models it is made from, whether it needs their class scores, and how it is computed.

    compute: of a level of B images and the distance of PDF, returns (B, H, W).
    """

    models: Literal["teacher", "student", "both"]
    needs_scores: bool
    compute: Callable[[Level, str], Tensor]


MAP_KINDS: Mapping[str, MapKind] = {
    "teacher_attention": MapKind("teacher", False, lambda level, _: spatial_attention(level.teacher)),
    "student_attention": MapKind("student", False, lambda level, _: spatial_attention(level.student)),
    "disparity": MapKind("both", False, lambda level, _: disparity(level.teacher, level.student)),
    "high": MapKind("both", False, lambda level, _: above_mean(disparity(level.teacher, level.student)).float()),
    "disagreement": MapKind("both", True, lambda level, distance: _disagreement(level, distance)),
    "richness": MapKind("teacher", True, lambda level, _: _richness(level)),
}


@dataclass(frozen=True)
class MapSettings:
    """Holds what maps depend on beside the models.

    classes: how those of the two models are paired. imgsz: the side of the images in pixels. teacher_imgsz: as in
    InferenceSettings. teacher_channels: as in `seen_channels`. distance: PDF's, between class predictions.
    """

    classes: ClassPairing
    imgsz: int
    teacher_imgsz: int | None = None
    teacher_channels: tuple[int, ...] | None = None
    distance: str = method_defaults("pdf")["distance"]


@dataclass(frozen=True)
class Observation:
    """Maps of some images by level, finest level first; shares: of the teacher's confidence, by level, if known."""

    maps: LevelMaps
    shares: dict[str, float]


@torch.no_grad()
def observe(
    student: Detector,
    teacher: Detector | None,
    samples: Sequence[Sample],
    settings: MapSettings,
    device: torch.device,
    names: Sequence[str] = tuple(MAP_KINDS),
) -> Observation:
    """Return the maps with these names that can be made of a student, which is not changed, and of a teacher.

    Both run in float32, image by image. The student's own maps are compared, without an adapter: attention is a mean
    over channels, so that their number need not be equal. The random states are left as they were.
    """
    with preserve_random_state():
        small = detector_teacher(student, "student").to(device)
        large = small
        if teacher is not None:
            large = detector_teacher(teacher).for_images(small.channels, settings.teacher_channels)
            large = large.with_settings(InferenceSettings(imgsz=settings.teacher_imgsz)).to(device)
        levels = [_levels(small, large, as_images(sample, settings.imgsz).to(device), settings) for sample in samples]
    maps: LevelMaps = {}
    for at_one_level in zip(*levels, strict=True):
        kinds = {name: MAP_KINDS[name] for name in names if _can_make(MAP_KINDS[name], at_one_level[0], teacher)}
        maps[level_name(at_one_level[0].stride)] = {
            name: np.concatenate([kind.compute(level, settings.distance).cpu().numpy() for level in at_one_level])
            for name, kind in kinds.items()
        }
    return Observation(maps, _shares(levels) if teacher is not None else {})


def _levels(student: Teacher, teacher: Teacher, images: Tensor, settings: MapSettings) -> list[Level]:
    """Return the levels that both models have, finest first, with class scores if both score positions."""
    scored = RequestedOutputs(logits=student.has_logits and teacher.has_logits)
    seen, known = student(images, scored), teacher(images, scored)
    classes = settings.classes.student, settings.classes.teacher
    select = [ClassSelection(indices).to(images.device) for indices in classes]
    levels = []
    for stride in sorted(seen.maps.keys() & known.maps.keys()):
        level = Level(stride, seen.maps[stride], resize_to(seen.maps[stride], known.maps[stride]))
        if scored.logits:
            level.student_logits = select[0](seen.logits[stride])
            level.teacher_logits = resize_to(seen.maps[stride], select[1](known.logits[stride]))
        levels.append(level)
    return levels


def _can_make(kind: MapKind, level: Level, teacher: Detector | None) -> bool:
    has_scores = level.teacher_logits is not None
    return (has_scores or not kind.needs_scores) and (teacher is not None or kind.models == "student")


def _shares(levels: Sequence[Sequence[Level]]) -> dict[str, float]:
    """Return the shares of the levels in the teacher's confidence, the mean over images; none if it is not known."""
    shares = [
        confidence_shares([level.teacher_logits for level in of_image if level.teacher_logits is not None])
        for of_image in levels
        if of_image[0].teacher_logits is not None
    ]
    names = [level_name(level.stride) for level in levels[0]] if shares else []
    return dict(zip(names, torch.stack(shares).mean(0).tolist(), strict=True)) if shares else {}


def _disagreement(level: Level, distance: str) -> Tensor:
    assert level.teacher_logits is not None
    assert level.student_logits is not None
    return class_disagreement(level.teacher_logits, level.student_logits, distance)  # type: ignore[arg-type]


def _richness(level: Level) -> Tensor:
    assert level.teacher_logits is not None
    return richness(level.teacher_logits.float().sigmoid())
