"""Balanced gains and schedules: their arithmetic, and their effect in real trainings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import two_images, write_dataset
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, attach_criterion, random_detector, save_checkpoint
from helpers.results import rows, states_equal, weights
from helpers.runs import distil, train_and_stop
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from ultralytics.cfg import get_cfg

from yolokd import YoloDistiller
from yolokd.config.schedule import Schedule
from yolokd.distillation.balance import WINDOW, Balance
from yolokd.methods.fitnet import FitNet
from yolokd.models.teacher import Teacher
from yolokd.training.sidecar import sidecar_path

LEVELS = ("P3", "P4", "P5")


def test_a_gain_is_the_chosen_ratio_over_the_measured_one() -> None:
    balance = Balance(2, 3)
    balance.update(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[2.0, 2.0, 2.0], [0.5, 1e-4, 8.0]]))
    gains = balance.gains(torch.tensor([0.3, 0.3, 0.6]), torch.zeros(2, 3))
    assert torch.allclose(gains, torch.tensor([[0.15, 0.3, 1.2], [0.6, 6000.0, 0.3]]))


def test_gradient_norms_are_averaged_over_a_window() -> None:
    balance = Balance(1, 1)
    for value in [1.0] * (WINDOW - 1) + [1.0 + WINDOW]:
        balance.update(torch.tensor([1.0]), torch.tensor([[value]]))
    assert float(balance.pull) == pytest.approx(2.0)  # the plain mean, until the window is full
    for _ in range(20 * WINDOW):
        balance.update(torch.tensor([1.0]), torch.tensor([[7.0]]))
    assert float(balance.pull) == pytest.approx(7.0, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_norms_that_are_zero_or_not_finite_leave_the_gain_as_it_is(bad: float) -> None:
    balance, fixed = Balance(1, 2), torch.tensor([[5.0, 5.0]])
    ratios = torch.ones(2)
    balance.update(torch.tensor([1.0, 1.0]), torch.tensor([[bad, 2.0]]))
    assert balance.gains(ratios, fixed).tolist() == [[5.0, 0.5]]
    balance.update(torch.tensor([3.0, 3.0]), torch.tensor([[4.0, bad]]))
    assert balance.gains(ratios, fixed).tolist() == [[0.75, 0.5]]
    balance.update(torch.tensor([bad, bad]), torch.tensor([[4.0, 4.0]]))
    assert balance.gains(ratios, fixed).tolist() == [[0.75, 0.5]]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 20), st.floats(0.5, 30), st.floats(0, 40))
def test_a_schedules_factor_is_between_0_and_1_and_0_after_its_end(
    shape: Any, warmup: float, end: float, epoch: float
) -> None:
    factor = Schedule(schedule=shape, warmup=warmup, end=end).factor(epoch, 40)
    assert 0 <= factor <= 1
    assert factor == 0 or epoch < end


def test_constant_and_cosine_schedules_have_their_shapes() -> None:
    epochs = [0.0, 1.0, 2.0, 6.0, 9.999, 10.0]
    shapes = ("constant", "cosine")
    factors = {s: [Schedule(schedule=s, warmup=2.0, end=10.0).factor(e, 99) for e in epochs] for s in shapes}
    assert factors["constant"] == [0, 0.5, 1, 1, 1, 0]
    assert factors["cosine"] == pytest.approx([0, 0.5, 1, 0.5, 0, 0], abs=1e-6)
    assert Schedule(schedule="constant").factor(3, 4) == 1
    assert Schedule().factor(2, 4) == pytest.approx(0.5)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """Multiply FitNet's loss by a number that the test can set."""
    factor = {"by": 1.0}
    plain = FitNet.forward
    monkeypatch.setattr(FitNet, "forward", lambda self, level: plain(self, level) * factor["by"])
    return iter([factor])  # type: ignore[return-value]


@pytest.mark.parametrize("student", [YOLOV8N, pytest.param(YOLO26N, marks=pytest.mark.slow)])
def test_a_balanced_training_does_not_depend_on_the_scale_of_a_loss(
    student: str, scaled: Any, tiny: dict[str, Any], teacher: str
) -> None:
    factor = next(scaled)
    tiny |= {"epochs": 7, "balance": 0.3, "probe": 4}  # 21 steps, 6 measurements
    plain = distil(teacher, student, tiny, method="fitnet")
    factor["by"] = 1024.0
    loud = distil(teacher, student, tiny, method="fitnet")
    assert rows(loud.trainer)[-1]["train/fitnet_loss"] == pytest.approx(
        1024 * rows(plain.trainer)[-1]["train/fitnet_loss"], rel=1e-3
    )
    assert states_equal(weights(loud.trainer), weights(plain.trainer))
    if student == YOLOV8N:  # another ratio does change the student
        other = distil(teacher, student, tiny | {"balance": 0.6}, method="fitnet")
        assert not states_equal(weights(other.trainer), weights(plain.trainer))


def test_the_chosen_ratio_of_gradients_holds_at_each_level() -> None:
    """The losses of the levels differ by factors of 1000: the gradient measured at P3 must not include the others'."""
    teacher, student = random_detector(YOLOV8S), random_detector(YOLOV8N, seed=1)
    student.args = get_cfg(overrides={"imgsz": 64})
    criterion = attach_criterion(teacher, student, method="fitnet+frs", balance=0.2)
    criterion.begin_epoch(0, epochs=2, steps=1)
    losses: list[list[Tensor]] = []
    factors = (1.0, 1e3, 1e6)

    def spread(_module: object, _inputs: object, level_losses: list[Tensor]) -> list[Tensor]:
        losses.append([loss * by for loss, by in zip(level_losses, factors, strict=True)])
        return losses[-1]

    for method in criterion.stage.methods:
        method.register_forward_hook(spread)
    batch = two_images()
    preds = student(batch["img"])
    criterion(preds, batch)
    maps = preds["feats"]
    task = gradients(criterion.base(preds, batch)[0].sum(), maps)
    gains = criterion.stage.gains(torch.ones(2))
    for level_losses, level_gains in zip(losses, gains, strict=True):
        scaled = [2 * gain * loss for gain, loss in zip(level_gains, level_losses, strict=True)]  # times the two images
        alone = torch.cat([gradients(loss, [m]) for loss, m in zip(scaled, maps, strict=True)])
        assert torch.allclose(alone / task, torch.tensor(0.2), rtol=1e-3)
        together = (
            gradients(torch.stack(scaled).sum(), maps) / task
        )  # includes gradients that flow back from coarser maps
        assert ((together > 0.15) & (together < 0.35)).all()


def gradients(loss: Tensor, maps: list[Tensor]) -> Tensor:
    """Return the norm of a loss's gradient at each map."""
    return torch.stack([g.norm() for g in torch.autograd.grad(loss, maps, retain_graph=True)])


@pytest.mark.parametrize("level_weights", ["uniform", "confidence"])
def test_results_csv_holds_the_chosen_ratio_of_gradients(
    level_weights: str, tiny: dict[str, Any], teacher: str
) -> None:
    tiny |= {"probe": 1000, "epochs": 1, "balance": 0.2, "level_weights": level_weights}
    row = rows(distil(teacher, YOLOV8N, tiny, method="dfd+frs", **{"frs.warmup": 0.0}).trainer)[0]
    for level in LEVELS:
        weight = 1 if level_weights == "uniform" else 3 * row[f"level/{level}/share"]
        for method in ("dfd", "frs"):
            assert row[f"level/{level}/{method}_ratio"] == pytest.approx(0.2 * weight, rel=1e-3)
            assert row[f"level/{level}/{method}_gain"] > 0


def test_a_resume_restores_the_averaged_gradient_norms(tiny: dict[str, Any], teacher: str) -> None:
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd", balance=0.3, probe=2)
    train_and_stop(d, tiny)
    saved = torch.load(sidecar_path(d.trainer.last, 0), weights_only=True)["criterion"]
    assert (saved["stages.0.balance.seen"] == 2).all()
    resumed = YoloDistiller()
    seen: list[dict[str, Tensor]] = []
    resumed.add_callback(
        "on_train_start", lambda t: seen.append({k: v.clone() for k, v in t.criterion.private_state().items()})
    )
    resumed.train(resume=str(d.trainer.save_dir))
    assert states_equal(seen[0], saved)
    assert (resumed.trainer.criterion.stage.balance.seen == 3).all()


def record_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Record (largest number of channels of the teacher, address of the batch) of each teacher run in a training."""
    runs: list[tuple[int, int]] = []
    run = Teacher._run

    def recorded(self: Teacher, images: Tensor, *args: Any) -> Any:
        if len(images) > 1:  # the plan tries one image before the training
            runs.append((max(m for m in self.pyramid.values()), images.data_ptr()))
        return run(self, images, *args)

    monkeypatch.setattr(Teacher, "_run", recorded)
    return runs


def test_after_a_schedules_end_the_teacher_does_not_run(
    tiny: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = record_runs(monkeypatch)
    keys = {"fitnet.schedule": "linear", "fitnet.warmup": 1.0, "fitnet.end": 2.0, "epochs": 4, "balance": "off"}
    d = distil(teacher, YOLOV8N, tiny | keys, method="fitnet")
    results = rows(d.trainer)
    # Three steps an epoch: the factor rises (0, 1/3, 2/3), falls (1, 2/3, 1/3), and is then 0.
    assert [r["train/fitnet_gain"] for r in results] == pytest.approx([5 * 1 / 3, 5 * 2 / 3, 0, 0], rel=1e-3)
    assert results[0]["train/fitnet_loss"] > 0
    assert results[2]["train/fitnet_loss"] == 0
    assert results[0]["level/P3/fitnet_gain"] > 0
    assert [results[2][f"level/P3/fitnet_{what}"] for what in ("grad", "ratio", "gain")] == [0, 0, 0]
    assert results[2]["level/P3/task_grad"] > 0  # the last measurement
    assert len(runs) == 5  # not six: in the first step the factor is 0


def test_each_teacher_teaches_in_its_stage_also_after_a_resume(
    tiny: dict[str, Any], teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = str(save_checkpoint(random_detector(YOLOV8N, seed=4), tmp_path / "weak.pt"))
    runs = record_runs(monkeypatch)
    tiny |= {"epochs": 4, "stages": [3], "probe": 2}
    distil([weak, teacher], YOLOV8N, tiny, method="dfmsd+dfd")
    assert [channels for channels, _ in runs] == [64] * 9 + [128] * 3
    runs.clear()

    d = YoloDistiller(teacher=[weak, teacher], student=YOLOV8N, method="dfmsd", teacher_precision="fp32")
    train_and_stop(d, tiny, epoch=2)
    assert {channels for channels, _ in runs} == {64}
    runs.clear()
    YoloDistiller().train(resume=str(d.trainer.save_dir))
    assert [channels for channels, _ in runs] == [128] * 3


def test_stages_are_equally_long_by_default(
    tiny: dict[str, Any], teacher: str, tmp_path: Path, monkeypatch: Any
) -> None:
    weak = str(save_checkpoint(random_detector(YOLOV8N, seed=4), tmp_path / "weak.pt"))
    runs = record_runs(monkeypatch)
    distil([weak, teacher], YOLOV8N, tiny, method="fitnet", check_teacher=True)
    assert [channels for channels, _ in runs] == [64] * 3 + [128] * 3


def test_images_without_boxes_and_with_hundreds_of_boxes_train(
    tiny: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    """fgd and dfmsd read the boxes of the labels: here none, or hundreds, some of which have no area after rounding."""
    path = write_dataset(tmp_path / "odd", train=8)
    labels = sorted((tmp_path / "odd" / "labels" / "train").glob("*.txt"))
    for empty in labels[:5]:
        empty.write_text("")
    lines = [f"0 {i % 20 / 20 + 0.02} {i // 20 / 20 + 0.02} {0.04 if i % 7 else 0.0001} 0.04" for i in range(300)]
    labels[5].write_text("\n".join(lines))
    keys = tiny | {"data": str(path), "mosaic": 0.0}
    results = rows(distil(teacher, YOLOV8N, keys, method="fgd+dfmsd", balance=0.3).trainer)
    assert all(math.isfinite(row[f"train/{name}_loss"]) and row[f"train/{name}_loss"] > 0
               for row in results for name in ("fgd", "dfmsd"))  # fmt: skip
