"""What methods get of the heads beside class scores: raw box outputs, assigned positions, the teacher's head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.data import two_images
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, attach_criterion, random_detector
from torch import Tensor
from ultralytics.cfg import get_cfg

from yolokd import register
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.distillation.observer import StepObserver
from yolokd.methods import Method
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.models.teachers.teacher import InferenceSettings
from yolokd.pyramid.boxes import decode_distances
from yolokd.pyramid.level import Level, LevelShape


@register("all_outputs")
class AllOutputs(Method):
    """Pulls all that a head gives to zero, and keeps the level."""

    wants_boxes = wants_box_logits = wants_assigned = True
    wants_teacher_head = True
    head_depth = 2

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.level: Level | None = None

    def forward(self, level: Level) -> Tensor:
        self.level = level
        assert level.student_box_logits is not None
        return level.student_box_logits.square().mean()


def run(
    student_cfg: str, batch: dict[str, Any], method: str = "all_outputs", **keys: Any
) -> tuple[DistillationCriterion, Any, Any]:
    """Return the criterion after one step, the student's predictions of its one-to-many branch, and the losses."""
    torch.manual_seed(0)
    student = random_detector(student_cfg, seed=1)
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(YOLOV8S), student, method=method, balance="off", **keys)
    criterion.begin_step(batch["img"])
    preds = student(batch["img"])
    losses, _ = criterion(preds, batch)
    vars(criterion)["student"] = student  # which the criterion itself does not keep alive
    return criterion, preds.get("one2many", preds), losses


def levels_of(criterion: DistillationCriterion) -> list[Level]:
    return [method.level for method in criterion.stage.methods[0]]  # type: ignore[union-attr]


@pytest.mark.parametrize("student", [YOLOV8N, YOLO26N])
def test_the_assigned_positions_are_those_of_the_yolo_loss(student: str) -> None:
    """Of an end-to-end student, those of its one-to-many loss: its one-to-one loss assigns one for each object."""
    batch = two_images()
    criterion, preds, _ = run(student, batch)
    base = getattr(criterion.base, "one2many", criterion.base)
    expected = base.get_assigned_targets_and_loss(preds, batch)[0][0]
    assigned = torch.cat([level.assigned.flatten(1) for level in levels_of(criterion)], 1)
    assert torch.equal(assigned, expected)
    assert (assigned.sum(1) > 1).all()


def test_nothing_is_assigned_in_a_batch_without_labels() -> None:
    unlabelled = two_images() | {"cls": torch.zeros(0, 1), "bboxes": torch.zeros(0, 4), "batch_idx": torch.zeros(0)}
    criterion, _, losses = run(YOLOV8N, unlabelled, method="all_outputs+ld")
    assert not any(level.assigned.any() for level in levels_of(criterion))
    assert losses[-1] == 0


def test_nothing_is_assigned_in_images_that_the_yolo_loss_did_not_see() -> None:
    observer = StepObserver(wants_assigned=True, depths=())
    observer._note_assigned(torch.nn.Identity(), (), (torch.empty(0),) * 3 + (torch.ones(2, 5) > 0,))
    assigned = observer.take(3).assigned
    assert assigned is not None
    assert assigned.dtype == torch.bool
    assert assigned.sum(1).tolist() == [5, 5, 0]


@pytest.mark.parametrize(("student", "bins"), [(YOLOV8N, 16), (YOLO26N, 1)])
def test_raw_box_outputs_are_those_that_boxes_are_decoded_from(student: str, bins: int) -> None:
    criterion, preds, _ = run(student, two_images())
    for level in levels_of(criterion):
        b, _, h, w = level.student.shape
        assert level.student_box_logits.shape == (b, 4, bins, h, w)
        assert level.teacher_box_logits.shape == (b, 4, 16, h, w)
        for logits, boxes in (
            (level.student_box_logits, level.student_boxes),
            (level.teacher_box_logits, level.teacher_boxes),
        ):
            assert torch.equal(decode_distances(logits.flatten(1, 2), logits.shape[2]), boxes)
    raw = torch.cat([level.student_box_logits.flatten(1, 2).flatten(2) for level in levels_of(criterion)], 2)
    assert torch.equal(raw, preds["boxes"])


def test_a_gradient_that_is_not_finite_stops_at_the_raw_box_outputs() -> None:
    criterion, preds, losses = run(YOLOV8N, two_images())
    preds["boxes"].retain_grad()
    losses[-1].mul(torch.nan).backward()
    assert torch.equal(preds["boxes"].grad, torch.zeros_like(preds["boxes"]))
    assert criterion.guard._gradient_flags


@pytest.mark.parametrize("name", [YOLOV8N, YOLO26N])
@pytest.mark.parametrize("settings", [InferenceSettings(), InferenceSettings(torch.bfloat16, channels_last=True)])
def test_a_teachers_head_gives_the_teachers_predictions_of_its_own_maps(name: str, settings: InferenceSettings) -> None:
    """In float32, also beside a teacher that runs in bfloat16: small gradients would be lost otherwise."""
    plain = detector_teacher(random_detector(name))
    output = plain(two_images()["img"], RequestedOutputs(logits=True, box_logits=True))
    heads = plain.with_settings(settings).heads
    assert len(heads) == 3
    for stride, head in heads.items():
        maps = output.maps[stride].requires_grad_()
        logits, boxes = head.class_logits(maps), head.box_logits(maps)
        torch.testing.assert_close(logits, output.logits[stride])
        torch.testing.assert_close(boxes.flatten(1, 2), output.box_logits[stride])
        (logits.sum() + boxes.sum()).backward()
        assert maps.grad.abs().sum() > 0
        parameters = [*head.box_layers.parameters(), *head.class_layers.parameters()]
        assert not any(p.requires_grad for p in parameters)


def test_the_shape_of_a_head_counts_the_channels_that_enter_its_layers() -> None:
    head = detector_teacher(random_detector(YOLOV8S)).heads[16]
    maps = torch.rand(1, head.shape.box_channels[0], 4, 4)
    for layers, channels in (
        (head.box_layers, head.shape.box_channels),
        (head.class_layers, head.shape.class_channels),
    ):
        assert len(channels) == 3
        entering = maps
        for layer, count in zip(layers, channels, strict=True):
            assert entering.shape[1] == count
            entering = layer(entering)


@pytest.mark.parametrize("student", [YOLOV8N, YOLO26N])
def test_maps_within_the_students_head_lead_to_its_predictions(student: str) -> None:
    """Of an end-to-end student, to those of its one-to-many head."""
    criterion, preds, _ = run(student, two_images())
    head = criterion.student.model[-1]
    for name, branch, layers in (("boxes", 0, head.cv2), ("scores", 1, head.cv3)):
        last = [level.head_maps[2][branch] for level in levels_of(criterion)]
        predicted = [convs[2](maps).flatten(2) for convs, maps in zip(layers, last, strict=True)]
        assert torch.equal(torch.cat(predicted, 2), preds[name])


def test_no_hook_stays_in_the_students_head() -> None:
    """After a step, and after one that failed before its loss: a checkpoint with hooks could not be loaded."""
    criterion, _, _ = run(YOLOV8N, two_images())

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in criterion.student.modules())

    assert hooks() == 0
    criterion.begin_epoch(0, epochs=2, steps=9)
    for _ in range(2):
        criterion.begin_step(two_images()["img"])
        assert hooks() == 6
    criterion.discard_step()
    assert hooks() == 0


@pytest.mark.parametrize("student", [YOLOV8N, YOLO26N])
def test_crosskd_within_the_head_trains_the_layers_before_the_adapter(student: str) -> None:
    criterion, _, losses = run(student, two_images(), method="crosskd", **{"crosskd.depth": 1})
    losses[-1].backward()
    head = criterion.student.model[-1]
    for branch in (head.cv2, head.cv3):
        for layers in branch:
            taught = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in layers]
            assert taught[1:] == [False, False]
        assert any(p.grad is not None and p.grad.any() for layers in branch for p in layers[0].parameters())
    assert len(list(criterion.parameters())) == 12  # weight and bias of two adapters at each level
    untaught = [p.grad for layers in getattr(head, "one2one_cv3", ()) for p in layers.parameters()]
    assert not any(gradient is not None and gradient.any() for gradient in untaught)


@pytest.mark.parametrize("student", [YOLOV8N, YOLO26N])
def test_crosskd_trains_adapters_and_neck_through_the_teachers_head_which_stays_as_it_is(student: str) -> None:
    criterion, _, losses = run(student, two_images(), method="crosskd")
    teacher = criterion.stage.teacher
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    losses[-1].backward()
    taught = [any(p.grad is not None and p.grad.any() for p in layer.parameters()) for layer in criterion.student.model]
    assert all(taught[:10])  # the backbone
    assert not taught[-1]  # the head
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in criterion.parameters())
    assert len(list(criterion.parameters())) == 6  # weight and bias of an adapter at each level
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert not any(p.grad is not None for p in teacher._model.parameters())


def test_crosskd_compares_the_classes_that_both_models_have() -> None:
    """Of a teacher that knows other classes in another order; if no name is shared, the highest score of each."""
    for names, expected in (
        ({0: "cat", 1: "box", 2: "disc"}, [2, 1]),
        ({0: "cat", 1: "cow"}, None),
    ):
        student = random_detector(seed=1)
        student.args = get_cfg()
        criterion = attach_criterion(random_detector(YOLOV8S, names), student, method="all_outputs")
        criterion.begin_step(two_images()["img"])
        criterion(student(two_images()["img"]), two_images())
        for stride, level in zip((8, 16, 32), levels_of(criterion), strict=True):
            head = criterion.stage.teacher.heads[stride]
            every = head.class_logits(level.teacher)
            wanted = every[:, expected] if expected else every.amax(1, keepdim=True)
            assert torch.equal(level.teacher_head.class_logits(level.teacher), wanted)
