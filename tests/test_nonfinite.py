"""Losses and gradients that are not finite: their steps train without distillation, and the student stays finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import write_dataset
from helpers.models import YOLOV8N
from helpers.results import rows, states_equal, weights
from helpers.runs import captured_log
from torch import Tensor, nn

from yolokd import UserError, YoloDistiller, register
from yolokd.distillation.nonfinite import MAX_SKIPPED_IN_A_ROW, MAX_STEPS_IN_A_ROW, NonFiniteGuard
from yolokd.methods import Method
from yolokd.models.teachers.outputs import TeacherOutput
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.level import Level


def break_teacher(monkeypatch: pytest.MonkeyPatch, value: float, steps: set[int]) -> None:
    """Make the teacher's map of stride 16 `value` for the second image, in some steps."""
    run, counter = Teacher._run, iter(range(10**6))

    def broken(self: Teacher, *args: Any) -> TeacherOutput:
        output = run(self, *args)
        if len(args[0]) > 1 and next(counter) in steps:  # the plan tries one image before the training
            output.maps[16][1] = value
        return output

    monkeypatch.setattr(Teacher, "_run", broken)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("balance", [0.3, "off"])
def test_steps_with_a_nonfinite_teacher_train_without_distillation(
    value: float, balance: Any, tiny: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_teacher(monkeypatch, value, {0, 1, 4})
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd+pdf", balance=balance)
    with captured_log() as lines:
        d.train(**tiny | {"teacher_precision": "fp32", "probe": 2})
    assert [r["distill/dropped"] for r in rows(d.trainer)] == [2, 1]
    warnings = [line for line in lines if "is not finite" in line]
    assert len(warnings) == 2  # once an epoch
    assert "dfd's loss at P4" in warnings[0]
    assert ".jpg);" in warnings[0]  # one image: the other maps are finite
    assert all(torch.isfinite(v).all() for v in weights(d.trainer).values())
    assert all(torch.isfinite(p).all() for p in d.trainer.criterion.parameters())
    assert torch.isfinite(d.trainer.criterion.stage.balance.pull).all()


def test_many_nonfinite_steps_in_a_row_are_an_error(
    tiny: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_teacher(monkeypatch, math.nan, set(range(1000)))
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet")
    with pytest.raises(
        UserError, match=rf"fitnet's loss at P4 is not finite for {MAX_STEPS_IN_A_ROW} steps in a row \(images "
    ):
        d.train(**tiny | {"epochs": 9, "teacher_precision": "fp32"})
    assert d.trainer.last.exists()


def test_a_broken_student_is_left_to_ultralytics_which_recovers_it(
    tiny: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet")
    steps, broken = 2 * MAX_STEPS_IN_A_ROW, []

    def poison(trainer: Any) -> None:
        if trainer.epoch == 1 and not broken:
            broken.append(trainer.epoch)
            with torch.no_grad():
                next(trainer.model.model.parameters()).fill_(math.nan)

    d.add_callback("on_train_batch_start", poison)
    with captured_log() as lines:
        d.train(**tiny | {"epochs": 3, "batch": 1, "data": str(write_dataset(tmp_path / "d", train=steps))})
    assert len(d.trainer.train_loader) == steps
    assert any("recover" in line.lower() for line in lines)
    assert any("the YOLO loss is not finite" in line for line in lines)
    assert [r["distill/dropped"] for r in rows(d.trainer)] == [0, 0, 0]  # the broken epoch was repeated
    assert all(torch.isfinite(v).all() for v in weights(d.trainer).values())


@pytest.mark.parametrize("batches_per_step", [1, 16])
def test_gradients_that_overflow_get_as_many_steps_of_the_optimizer(batches_per_step: int) -> None:
    guard = NonFiniteGuard(["fitnet"])
    level = Level(8, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))
    parameter = nn.Parameter(torch.zeros(1))
    guard.guard_adapter(parameter)

    def step() -> None:
        guard.guard_losses(torch.zeros(1, 1), torch.zeros(1), [level], ["a.jpg"])
        (parameter * math.inf).sum().backward()
        guard.after_backward(batches_per_step)

    for _ in range(MAX_STEPS_IN_A_ROW * batches_per_step):
        step()
    with pytest.raises(UserError, match=f"for {MAX_STEPS_IN_A_ROW * batches_per_step} steps in a row"):
        step()  # flags are read one step late


class Explode(torch.autograd.Function):
    """A loss of 0 whose gradient is not finite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.sum() * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return torch.full(ctx.shape, math.inf)


@register("explosive")
class Explosive(Method):
    paper = "a gradient that is not finite, after an adapter or before it"

    def __init__(self, shape: Any, *, adapter: bool = False) -> None:
        super().__init__()
        self.adapt = nn.Conv2d(shape.student_channels, 2, 1) if adapter else nn.Identity()

    def forward(self, level: Any) -> Tensor:
        return Explode.apply(self.adapt(level.student.float()))


@pytest.mark.parametrize("adapter", [False, True])
def test_a_nonfinite_gradient_does_not_reach_the_student(adapter: bool, tiny: dict[str, Any], teacher: str) -> None:
    plain = YoloDistiller(student=YOLOV8N, method="none")
    plain.train(**tiny)
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="explosive", **{"explosive.adapter": adapter})
    d.train(**tiny | {"teacher_precision": "fp32", "level_weights": "uniform"})
    assert [r["distill/dropped"] for r in rows(d.trainer)] == [3, 3]
    assert states_equal(weights(d.trainer), weights(plain.trainer))
    assert all(torch.isfinite(p).all() for p in d.trainer.criterion.parameters())


def with_scaler(distiller: YoloDistiller) -> YoloDistiller:
    """Train under a gradient scaler, as CUDA does by default."""

    def use_scaler(trainer: Any) -> None:
        trainer.scaler = torch.amp.GradScaler("cpu")

    distiller.add_callback("on_pretrain_routine_end", use_scaler)
    return distiller


@pytest.mark.parametrize("adapter", [False, True])
def test_under_a_gradient_scaler_a_nonfinite_gradient_costs_the_distillation_and_not_the_step(
    adapter: bool, tiny: dict[str, Any], teacher: str
) -> None:
    plain = with_scaler(YoloDistiller(student=YOLOV8N, method="none"))
    plain.train(**tiny)
    keys = {"method": "explosive", "explosive.adapter": adapter}
    d = with_scaler(YoloDistiller(teacher=teacher, student=YOLOV8N, **keys))
    d.train(**tiny | {"teacher_precision": "fp32", "level_weights": "uniform"})
    assert [r["distill/dropped"] for r in rows(d.trainer)] == [3, 3]
    assert states_equal(weights(d.trainer), weights(plain.trainer))
    assert d.trainer.scaler.get_scale() == plain.trainer.scaler.get_scale() / 2**6  # it may have been an overflow


def break_gradients(trainer: Any) -> None:
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and not name.startswith("criterion."):
            parameter.register_hook(lambda gradient: gradient * math.nan)


def test_steps_that_a_gradient_scaler_skips_are_counted_and_named(tiny: dict[str, Any], teacher: str) -> None:
    d = with_scaler(YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet"))
    d.add_callback("on_train_start", break_gradients)
    with captured_log() as lines:
        d.train(**tiny | {"teacher_precision": "fp32"})
    assert [r["distill/dropped"] for r in rows(d.trainer)] == [3, 3]
    assert len([line for line in lines if "the gradient scaler skips the step" in line]) == 2  # once an epoch


def test_many_skipped_steps_in_a_row_are_an_error(tiny: dict[str, Any], teacher: str) -> None:
    d = with_scaler(YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet"))
    d.add_callback("on_train_start", break_gradients)
    with pytest.raises(UserError, match=rf"amp: .* is not finite for {MAX_SKIPPED_IN_A_ROW} steps in a row \(images "):
        d.train(**tiny | {"epochs": 9, "teacher_precision": "fp32", "val": False})


def test_steps_in_which_float16_overflows_are_dropped(
    tiny: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Teacher._run

    def overflowing(self: Teacher, *args: Any) -> TeacherOutput:
        output = run(self, *args)
        if len(args[0]) == 1:  # the plan tries one image before the training
            return output
        return TeacherOutput({s: (m * 1e30).half() for s, m in output.maps.items()}, *list(vars(output).values())[1:])

    monkeypatch.setattr(Teacher, "_run", overflowing)
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet")
    d.train(**tiny | {"epochs": 1, "teacher_precision": "fp32"})
    assert rows(d.trainer)[0]["distill/dropped"] == 3
    assert Path(d.trainer.best).exists()


def test_a_teacher_with_maps_of_zeros_trains(
    tiny: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Teacher._run

    def zeroed(self: Teacher, *args: Any) -> TeacherOutput:
        output = run(self, *args)
        return TeacherOutput({s: m * 0 for s, m in output.maps.items()}, *list(vars(output).values())[1:])

    monkeypatch.setattr(Teacher, "_run", zeroed)
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd+pdf+pkd+cwd+fgd+dfmsd", balance=0.3)
    d.train(**tiny | {"epochs": 1, "teacher_precision": "fp32"})
    assert rows(d.trainer)[0]["distill/dropped"] == 0
    assert all(torch.isfinite(v).all() for v in weights(d.trainer).values())


@register("hungry")
class Hungry(Method):
    paper = "the memory does not suffice for the second step"
    steps = 0

    def forward(self, level: Any) -> Tensor:
        Hungry.steps += level.stride == 8
        if Hungry.steps == 2:
            Hungry.steps += 1
            raise torch.OutOfMemoryError("out of memory")
        return level.student.square().mean() * 0

    def __init__(self, shape: Any) -> None:
        super().__init__()


def test_a_step_that_runs_out_of_memory_leaves_no_gradients_to_count(tiny: dict[str, Any], teacher: str) -> None:
    """Ultralytics starts the epoch again with half the batch; the gradients of the first step are gone."""
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="hungry")
    pending: list[int] = []
    d.add_callback("on_train_epoch_start", lambda trainer: pending.append(trainer.steps.pending))
    d.train(**tiny | {"epochs": 1, "nbs": 20, "warmup_epochs": 0, "teacher_precision": "fp32"})
    assert d.trainer.batch_size == 2
    assert pending == [0, 0]
