"""Pairing of levels and classes, and reading the pyramids of all families of models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import random_detector, save_checkpoint
from helpers.results import states_equal
from hypothesis import given
from hypothesis import strategies as st
from ultralytics.nn.tasks import RTDETRDetectionModel, WorldModel, YOLOEModel, YOLOESegModel

from yolokd import UserError
from yolokd.models.checkpoint import load_student
from yolokd.models.detector import read_pyramid
from yolokd.models.evaluate import aligned_copy
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.pyramid.level import confidence_shares, resize_to, split_levels
from yolokd.pyramid.pairing import ClassSelection, pair_classes, pair_levels

strides = st.dictionaries(st.sampled_from([4, 8, 16, 32, 64]), st.integers(1, 512), max_size=5)
names = st.dictionaries(st.integers(0, 9), st.sampled_from(["cat", "Dog ", "dog", "cow", "CAT", ""]), max_size=6)


@given(strides, strides)
def test_levels_pair_at_shared_strides(teacher: dict[int, int], student: dict[int, int]) -> None:
    shared = sorted(teacher.keys() & student.keys())
    if not shared:
        with pytest.raises(UserError, match="none in common"):
            pair_levels(teacher, student)
        return
    levels = pair_levels(teacher, student)
    assert [x.stride for x in levels] == shared
    assert all((x.teacher_channels, x.student_channels) == (teacher[x.stride], student[x.stride]) for x in levels)


@given(names, names)
def test_classes_pair_by_name(teacher: dict[int, str], student: dict[int, str]) -> None:
    if len({n.strip().lower() for n in student.values()}) < len(student):
        with pytest.raises(UserError, match="two classes are called"):
            pair_classes(teacher, student)
        return
    pairing = pair_classes(teacher, student)
    for (t,), s in zip(pairing.teacher, pairing.student, strict=True):
        assert teacher[t].strip().lower() == student[s].strip().lower()
    shared = {n.strip().lower() for n in teacher.values()} & {n.strip().lower() for n in student.values()}
    assert {student[s].strip().lower() for s in pairing.student} == shared
    assert pairing.objectness == (not shared)


def test_selected_class_scores_are_in_the_same_order() -> None:
    pairing = pair_classes({0: "a", 1: "b", 2: "c"}, {0: "c", 1: "x", 2: "a"})
    teacher, student = torch.arange(3.0).view(1, 3, 1, 1), torch.arange(3.0).view(1, 3, 1, 1)
    assert ClassSelection(pairing.teacher)(teacher).flatten().tolist() == [2, 0]
    assert ClassSelection(pairing.student)(student).flatten().tolist() == [0, 2]


def test_without_a_shared_class_the_highest_score_is_compared() -> None:
    logits = torch.tensor([[1.0, 5.0], [3.0, -2.0]]).view(1, 2, 1, 2)
    assert ClassSelection(())(logits).flatten().tolist() == [3, 5]


def test_maps_are_resampled_to_the_teachers_grid() -> None:
    small, large = torch.rand(2, 3, 4, 5), torch.rand(2, 7, 8, 10)
    assert resize_to(small, large).shape == (2, 7, 4, 5)
    assert resize_to(small, small) is small


def test_concatenated_outputs_split_into_levels() -> None:
    maps = [torch.zeros(2, 1, 4, 6), torch.zeros(2, 1, 2, 3)]
    flat = torch.arange(2 * 5 * 30.0).view(2, 5, 30)
    parts = split_levels(flat, maps)
    assert [p.shape for p in parts] == [(2, 5, 4, 6), (2, 5, 2, 3)]
    assert torch.equal(torch.cat([p.flatten(2) for p in parts], 2), flat)


def test_confidence_shares_sum_to_one() -> None:
    shares = confidence_shares([torch.full((1, 2, 4, 4), 3.0), torch.full((1, 2, 2, 2), -20.0)])
    assert float(shares.sum()) == pytest.approx(1)
    assert float(shares[1]) < 1e-6


@pytest.mark.parametrize("cfg", ["yolov8n.yaml", "yolov8n-p2.yaml", "yolov8n-p6.yaml", "yolo11n.yaml", "yolo26n.yaml"])
def test_read_pyramid_works_on_any_family_and_leaves_the_model_unchanged(cfg: str) -> None:
    model = random_detector(cfg)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    pyramid = read_pyramid(model)
    assert list(pyramid) == [int(s) for s in model.stride]
    assert model.training
    assert states_equal(before, model.state_dict())


def test_a_teacher_gives_the_maps_and_logits_of_its_model() -> None:
    for cfg in ("yolov8n.yaml", "yolo26n.yaml"):
        model = random_detector(cfg)
        images = torch.rand(2, 3, 64, 96)
        head = model.model[-1]
        head.training = True
        with torch.no_grad():
            raw = model(images)
        raw = raw.get("one2many", raw)
        head.training = False
        output = detector_teacher(model)(images, RequestedOutputs(logits=True))
        logits = split_levels(raw["scores"], raw["feats"])
        for stride, expected, logit in zip([8, 16, 32], raw["feats"], logits, strict=True):
            assert torch.allclose(output.maps[stride], expected, rtol=1e-3, atol=1e-3)
            assert torch.allclose(output.logits[stride], logit, rtol=1e-3, atol=1e-3)


def test_an_rtdetr_teacher_gives_maps_and_no_logits() -> None:
    torch.manual_seed(0)
    teacher = detector_teacher(RTDETRDetectionModel("rtdetr-l.yaml", nc=2, verbose=False))
    output = teacher(torch.rand(1, 3, 64, 64), RequestedOutputs(logits=True))
    assert {k: v.shape for k, v in output.maps.items()} == {s: (1, 256, 64 // s, 64 // s) for s in (8, 16, 32)}
    assert not teacher.has_logits
    assert not output.logits


PROMPTED_HEADS = [
    (WorldModel, "yolov8s-world.yaml"),
    (YOLOEModel, "yoloe-11s.yaml"),
    (YOLOESegModel, "yoloe-11s-seg.yaml"),
]


@pytest.mark.parametrize(("family", "cfg"), PROMPTED_HEADS)
def test_prompted_teachers_give_maps_and_no_logits(family: Any, cfg: str) -> None:
    """YOLO-World and YOLOE pass embeddings of the classes to their heads together with the maps."""
    teacher = detector_teacher(family(cfg, nc=2, verbose=False))
    assert teacher.pyramid == {8: 128, 16: 256, 32: 512}
    assert not teacher.has_logits
    for count in (1, 2):
        output = teacher(torch.rand(count, 3, 64, 64))
        assert {k: v.shape for k, v in output.maps.items()} == {
            s: (count, c, 64 // s, 64 // s) for s, c in teacher.pyramid.items()
        }


def test_a_student_that_needs_prompts_is_refused(tmp_path: Path) -> None:
    """Ultralytics' detection trainer would call it without prompts."""
    path = save_checkpoint(WorldModel("yolov8s-world.yaml", nc=2, verbose=False), tmp_path / "world.pt")
    with pytest.raises(UserError, match=r"is a YOLO-World, which is told its classes"):
        load_student(path, {"nc": 2, "channels": 3}, trust=False)


def test_an_rtdetr_is_scored_on_the_classes_of_the_data_set() -> None:
    torch.manual_seed(0)
    model = RTDETRDetectionModel("rtdetr-l.yaml", nc=3, verbose=False).eval()
    with torch.no_grad():
        model.model[-1].dec_score_head[-1].weight.mul_(100)  # each class has the highest score somewhere
        images = torch.rand(1, 3, 64, 64)
        theirs = model(images)[0][0]
        ours = aligned_copy(model, {0: "a", 1: "b"}, {0: (2,), 1: (0,)})(images)[0][0]
    assert set(theirs[:, 5].tolist()) == {0, 1, 2}
    for before, after in zip(theirs.tolist(), ours.tolist(), strict=True):
        known = {2: 0, 0: 1}.get(int(before[5]))
        assert after == pytest.approx([*before[:4], before[4], known] if known is not None else [*before[:4], 0, 0])


def test_long_lists_of_classes_are_shortened_in_the_log() -> None:
    names = {i: f"c{i}" for i in range(80)}
    known = pair_classes({0: "c1"}, names).describe(names, {0: "c1"})
    assert known == "classes paired: 1 of 80 (c1); unknown to the teacher: c0, c2, c3, c4, c5, c6, c7, c8, c9, c10 …"
    assert pair_classes({0: "c0"}, {0: "c0"}).describe({0: "c0"}, {0: "c0"}) == "classes paired: 1 of 1 (c0)"
