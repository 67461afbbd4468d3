"""Balanced gains and schedules: their arithmetic, and their effect in real trainings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.data import two_images, write_dataset
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, attach_criterion, pair, random_detector, save_checkpoint
from helpers.results import rows, states_equal, weights
from helpers.runs import distil, train_and_stop
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from ultralytics.cfg import get_cfg

from yolokd import YoloDistiller
from yolokd.config.parse import parse
from yolokd.config.schedule import Schedule
from yolokd.distillation.balance import CEILING, WINDOW, Balance
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.methods.features.fitnet import FitNet
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.level import confidence_shares
from yolokd.training.logs import balance_summary
from yolokd.training.resume.sidecar import sidecar_path

LEVELS = ("P3", "P4", "P5")


def test_a_gain_is_the_chosen_ratio_over_the_measured_one() -> None:
    balance = Balance(2, 3)
    balance.update(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[2.0, 2.0, 2.0], [0.5, 1e-4, 8.0]]))
    gains = balance.gains(torch.tensor([0.3, 0.3, 0.6]), torch.zeros(2, 3))
    assert torch.allclose(gains, torch.tensor([[0.15, 0.3, 1.2], [0.6, 6000.0, 0.3]]))


def test_gradient_norms_are_averaged_over_a_window() -> None:
    balance = Balance(1, 1)
    for value in [1.0] * (WINDOW - 1) + [2.0**WINDOW]:
        balance.update(torch.tensor([1.0]), torch.tensor([[value]]))
    assert float(balance.pull) == pytest.approx(2.0)  # the plain geometric mean, until the window is full
    for _ in range(20 * WINDOW):
        balance.update(torch.tensor([1.0]), torch.tensor([[7.0]]))
    assert float(balance.pull) == pytest.approx(7.0, rel=1e-6)


def excess(norms: list[tuple[float, float]]) -> list[float]:
    """Return, after each measurement (YOLO loss, method), by what factor the gain exceeds that of its norms alone."""
    balance, factors = Balance(1, 1), []
    for task, pull in norms:
        balance.update(torch.tensor([task]), torch.tensor([[pull]]))
        gain = float(balance.gains(torch.tensor([0.5]), torch.zeros(1, 1)))
        factors.append(gain / (0.5 * task / pull))
    return factors


def reference_excess(norms: list[tuple[float, float]]) -> list[float]:
    """The same with plain numbers: the mean of log G - log G_m is all that counts."""
    mean, factors = 0.0, []
    for count, (task, pull) in enumerate(norms, 1):
        new = math.log(task / pull)
        mean += (new - mean) / min(count, WINDOW)
        mean = min(mean, new + math.log(CEILING))
        factors.append(math.exp(mean - new))
    return factors


def test_a_gain_follows_the_yolo_losss_gradient_when_that_falls_to_a_hundredth() -> None:
    norms = [(100.0, 2.0)] * 10 + [(1.0, 2.0)] * 4
    assert excess(norms) == pytest.approx([1.0] * 10 + [3.0, 3 ** (2 / 3), 3 ** (4 / 9), 3 ** (8 / 27)], rel=1e-4)
    back = excess(norms + [(100.0, 2.0)] * 12)
    assert back[-1] == pytest.approx(1, abs=0.05)  # and when it rises again
    assert max(back) == pytest.approx(CEILING, rel=1e-4)


norms_of_one_step = st.tuples(*[st.floats(2.0**-40, 2.0**40, width=32)] * 2)


@settings(max_examples=200, deadline=None)
@given(st.lists(norms_of_one_step, min_size=1, max_size=12), st.sampled_from([1e-6, 1.0, 1e6]))
def test_a_gain_is_never_above_the_ceiling_and_equals_the_reference(
    norms: list[tuple[float, float]], scale: float
) -> None:
    factors = excess([(task, pull * scale) for task, pull in norms])
    assert max(factors) <= CEILING * (1 + 1e-4)
    assert factors == pytest.approx(reference_excess(norms), rel=1e-3)


def test_no_measurement_can_hold_a_gain_at_0_or_infinity() -> None:
    extremes = [(1e-38, 1e38), (1e38, 1e-38), (1e-45, 1.0), (1e-30, 1e-38), (1e-30, 1e20)]
    assert excess(extremes + [(1.0, 1.0)] * 40)[-1] == pytest.approx(1, rel=1e-3)


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


def test_each_teacher_gets_a_whole_schedule() -> None:
    """Ten epochs, of which the first teacher has six and the second four."""
    keys = {"method": "fitnet+frs", "stages": [6], "fitnet.schedule": "linear", "frs.schedule": "constant"}
    config = parse({"teacher": ["weak", "strong"], **keys, "frs.warmup": 2.0, "frs.end": 3.0})
    student = random_detector(seed=2)
    teachers = [random_detector(), random_detector(seed=1)]
    pairing = pair(teachers[0], student)
    pairs = [(detector_teacher(teacher), pairing) for teacher in teachers]
    criterion = DistillationCriterion(student.train(), pairs, config, seed=0)
    factors, taught_by = [], []
    for epoch in range(10):
        criterion.begin_epoch(epoch, epochs=10, steps=3)
        factors.append(criterion.config.factors(criterion._epoch, criterion._epochs))
        taught_by.append(pairs.index((criterion.stage.teacher, pairing)))
    assert taught_by == [0] * 6 + [1] * 4
    assert [f for f, _ in factors] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 1, 3 / 4, 2 / 4, 1 / 4])
    assert [f for _, f in factors] == [0, 0.5, 1, 0, 0, 0, 0, 0.5, 1, 0]
    criterion.begin_epoch(6, epochs=8, steps=3)  # Ultralytics has shortened the training, as it does with time=
    assert criterion.config.factors(criterion._epoch, criterion._epochs) == [1, 0]
    criterion.begin_epoch(7, epochs=8, steps=3)
    assert criterion.config.factors(criterion._epoch, criterion._epochs) == [0.5, 0.5]


def test_the_stages_of_the_last_step_are_those_that_the_log_describes() -> None:
    student = random_detector(seed=1)
    student.args = get_cfg()
    config = parse({"teacher": "[t, u]", "stages": [1], "method": "fitnet"})
    pairs = [(detector_teacher(random_detector(seed=n)), pair(random_detector(), student)) for n in range(2)]
    criterion = DistillationCriterion(student.train(), pairs, config, seed=0)
    batch = two_images()
    for epoch, taught in enumerate((0, 1)):
        criterion.begin_epoch(epoch, epochs=2, steps=1)
        criterion.begin_step(batch["img"])
        criterion(student(batch["img"]), batch)
        assert criterion.taught == [criterion.stages[taught]]


@pytest.mark.parametrize("method", ["crosskd", "ld"])
def test_a_level_without_assigned_positions_is_not_measured_for_methods_that_learn_there(method: str) -> None:
    """CrossKD's gradient at such a level is weaker by a factor of 1e7 than with one position."""
    student = random_detector(seed=1)
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(YOLOV8S), student, method=f"fitnet+{method}", probe=1)
    criterion.begin_epoch(0, epochs=1, steps=9)
    batch = two_images() | {"bboxes": torch.full((2, 4), 0.12)}  # so small that P5 gets no position
    assigned: list[list[bool]] = []
    measure = criterion.stage.measure

    def watch(task: Tensor, losses: Any, maps: Any, levels: Any, output: Any) -> Tensor:
        assigned.append([bool(level.assigned.any()) for level in levels])
        return measure(task, losses, maps, levels, output)

    criterion.stage.measure = watch  # type: ignore[method-assign]
    for _ in range(3):
        criterion.begin_step(batch["img"])
        criterion(student(batch["img"]), batch)
    assert all(levels[0] and not levels[2] for levels in assigned)
    fitnet, other = criterion.stage.balance.seen.tolist()
    assert fitnet == [3, 3, 3]
    assert other == [sum(levels[i] for levels in assigned) for i in range(3)]


def test_one_teachers_schedule_spans_the_training() -> None:
    criterion = attach_criterion(random_detector(), random_detector(seed=1), method="dfd", **{"dfd.warmup": 1.0})
    for epoch in range(8):
        criterion.begin_epoch(epoch, epochs=7, steps=3)
        for step in range(3):
            expected = Schedule(warmup=1.0).factor((3 * epoch + step) / 3, 7)
            assert criterion.config.factors(criterion._epoch, criterion._epochs) == [expected]  # to the bit
            criterion._step += 1


def test_an_end_to_end_students_gradient_at_the_neck_is_that_of_its_one_to_many_loss() -> None:
    """So the reference of the balance shrinks with that loss's weight, from 0.8 at the start of a training to 0.1."""
    student, batch = random_detector(YOLO26N, seed=1), two_images()
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(), student, method="fitnet")
    preds = student(batch["img"])
    maps = preds["one2many"]["feats"]
    alone = gradients(criterion.base.one2many.loss(preds["one2many"], batch)[0].sum(), maps)
    for weight in (0.8, 0.1):
        criterion.base.o2m, criterion.base.o2o = weight, 1 - weight
        norms = gradients(criterion.base(preds, batch)[0].sum(), maps)
        assert torch.allclose(norms, weight * alone, rtol=1e-4)
        criterion.stage.balance.seen.zero_()
        criterion._step = 0
        criterion(preds, batch)
        assert torch.allclose(criterion.stage.balance.task[0], weight * alone, rtol=1e-4)


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


@pytest.mark.parametrize("floor", [0.0, 0.3, 1.0])
def test_levels_are_weighted_by_the_teachers_confidence_above_a_floor(floor: float) -> None:
    keys = {"method": "fitnet", "level_weights": "confidence", "level_floor": floor}
    stage = attach_criterion(random_detector(), random_detector(seed=1), **keys).stage
    assert stage.level_weights().tolist() == pytest.approx([1 / 3] * 3)  # until the teacher has run
    for shares in ([1.0, 0.0, 0.0], [0.9999, 0.0001, 0.0], [0.5, 0.3, 0.2]):
        stage.share.copy_(torch.tensor(shares))
        weights = stage.level_weights().tolist()
        assert weights == pytest.approx([(1 - floor) * share + floor / 3 for share in shares])
        assert sum(weights) == pytest.approx(1)
        assert min(weights) >= floor / 3 - 1e-6
        if floor == 0:
            assert weights == stage.share.tolist()  # to the bit


def test_shares_are_running_means_over_as_many_measurements_as_the_norms() -> None:
    student, measured = random_detector(seed=1), []
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(), student, method="fitnet", level_weights="confidence", probe=2)
    criterion.begin_epoch(0, epochs=1, steps=100)
    stage, expected = criterion.stage, torch.zeros(3)
    for step in range(2 * WINDOW + 3):
        batch, share_before = two_images(), stage.share.clone()
        stage.teacher._model.branches.one2many[0][-1].bias.add_(1)  # more confidence at P3 in each step
        criterion(student(batch["img"]), batch)
        if step % 2:
            assert torch.equal(stage.share, share_before)
            continue
        logits = stage.teacher(batch["img"], RequestedOutputs(logits=True)).logits
        measured.append(confidence_shares([logits[stride] for stride in (8, 16, 32)]))
        expected = expected + (measured[-1] - expected) / min(len(measured), WINDOW)
        assert torch.allclose(stage.share, expected, rtol=1e-5)
        assert float(stage.share.sum()) == pytest.approx(1)
    assert float(measured[-1][0]) > float(stage.share[0]) + 0.05  # the mean lags behind


def test_the_log_names_the_weights_of_the_levels_that_the_teacher_has() -> None:
    config = parse({"teacher": "t", "method": "fitnet", "level_floor": 0.3})
    values = {"P3": (0.9, 2.7), "P4": (0.1, 0.6), "P5": (math.nan, math.nan)}  # another teacher has P5
    means = {f"{level}/share": share for level, (share, _) in values.items()}
    means |= {f"{level}/fitnet_ratio": ratio for level, (_, ratio) in values.items()}
    weights = {"P3": 0.78, "P4": 0.22}
    line = balance_summary(SimpleNamespace(config=config), means, clip=0.5, weights=weights)  # type: ignore[arg-type]
    assert "fitnet P3 2.7, P4 0.6." in line
    assert "Teacher's confidence by level: P3 90.00%, P4 10.00%; weights of the levels: P3 78.00%, P4 22.00%." in line
    assert "P5" not in line


@pytest.mark.parametrize(("level_weights", "floor"), [("uniform", 0.0), ("confidence", 0.3)])
def test_results_csv_holds_the_chosen_ratio_of_gradients(
    level_weights: str, floor: float, tiny: dict[str, Any], teacher: str
) -> None:
    tiny |= {"probe": 1000, "epochs": 1, "balance": 0.2, "level_weights": level_weights, "level_floor": floor}
    row = rows(distil(teacher, YOLOV8N, tiny, method="dfd+frs", **{"frs.warmup": 0.0}).trainer)[0]
    for level in LEVELS:
        weight = 1 if level_weights == "uniform" else 3 * (0.7 * row[f"level/{level}/share"] + 0.1)
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
