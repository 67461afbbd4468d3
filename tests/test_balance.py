"""Balanced gains and schedules: their arithmetic, and what they do in real trainings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import attached, random_detector, save_checkpoint, states_equal, two_images, write_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from results import cut, rows, weights
from torch import Tensor
from ultralytics.cfg import get_cfg

from yolokd import YoloDistiller
from yolokd.config.schedule import Schedule
from yolokd.distillation.balance import WINDOW, Balance
from yolokd.methods.fitnet import FitNet
from yolokd.models.teacher import Teacher
from yolokd.training.sidecar import sidecar_path

LEVELS = ("P3", "P4", "P5")


def distil(teacher: Any, tiny: dict[str, Any], **more: Any) -> YoloDistiller:
    d = YoloDistiller(teacher=teacher, student=more.pop("student", "yolov8n.yaml"), method=more.pop("method", "fitnet"))
    d.train(**{"teacher_precision": "fp32"} | tiny | more)
    return d


def test_a_gain_is_the_share_over_the_ratio() -> None:
    balance = Balance(2, 3)
    balance.update(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[2.0, 2.0, 2.0], [0.5, 1e-4, 8.0]]))
    found = balance.gains(torch.tensor([0.3, 0.3, 0.6]), torch.zeros(2, 3))
    assert torch.allclose(found, torch.tensor([[0.15, 0.3, 1.2], [0.6, 6000.0, 0.3]]))


def test_means_run_over_a_window() -> None:
    balance = Balance(1, 1)
    for value in [1.0] * (WINDOW - 1) + [1.0 + WINDOW]:
        balance.update(torch.tensor([1.0]), torch.tensor([[value]]))
    assert float(balance.pull) == pytest.approx(2.0)  # at first the plain mean
    for _ in range(20 * WINDOW):
        balance.update(torch.tensor([1.0]), torch.tensor([[7.0]]))
    assert float(balance.pull) == pytest.approx(7.0, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0.0])
def test_what_is_no_measurement_leaves_the_gain(bad: float) -> None:
    balance, fixed = Balance(1, 2), torch.tensor([[5.0, 5.0]])
    share = torch.ones(2)
    balance.update(torch.tensor([1.0, 1.0]), torch.tensor([[bad, 2.0]]))
    assert balance.gains(share, fixed).tolist() == [[5.0, 0.5]]
    balance.update(torch.tensor([3.0, 3.0]), torch.tensor([[4.0, bad]]))
    assert balance.gains(share, fixed).tolist() == [[0.75, 0.5]]
    balance.update(torch.tensor([bad, bad]), torch.tensor([[4.0, 4.0]]))
    assert balance.gains(share, fixed).tolist() == [[0.75, 0.5]]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 20), st.floats(0.5, 30), st.floats(0, 40))
def test_a_schedule_stays_in_bounds_and_ends(shape: Any, warmup: float, end: float, epoch: float) -> None:
    factor = Schedule(schedule=shape, warmup=warmup, end=end).factor(epoch, 40)
    assert 0 <= factor <= 1
    assert factor == 0 or epoch < end


def test_shapes_of_schedules() -> None:
    at = [0.0, 1.0, 2.0, 6.0, 9.999, 10.0]
    found = {s: [Schedule(schedule=s, warmup=2.0, end=10.0).factor(e, 99) for e in at] for s in ("constant", "cosine")}
    assert found["constant"] == [0, 0.5, 1, 1, 1, 0]
    assert found["cosine"] == pytest.approx([0, 0.5, 1, 0.5, 0, 0], abs=1e-6)
    assert Schedule(schedule="constant").factor(3, 4) == 1
    assert Schedule().factor(2, 4) == pytest.approx(0.5)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, float]]:
    """FitNet's loss times a number."""
    factor = {"by": 1.0}
    plain = FitNet.forward
    monkeypatch.setattr(FitNet, "forward", lambda self, level: plain(self, level) * factor["by"])
    return iter([factor])  # type: ignore[return-value]


@pytest.mark.parametrize("student", ["yolov8n.yaml", pytest.param("yolo26n.yaml", marks=pytest.mark.slow)])
def test_a_losss_scale_changes_no_bit(student: str, scaled: Any, tiny: dict[str, Any], teacher: str) -> None:
    """20 steps, the first included."""
    factor = next(scaled)
    tiny |= {"epochs": 7, "balance": 0.3, "probe": 4, "student": student}  # 21 steps, 6 measurements
    plain = distil(teacher, tiny)
    factor["by"] = 1024.0
    loud = distil(teacher, tiny)
    assert rows(loud.trainer)[-1]["train/fitnet_loss"] == pytest.approx(
        1024 * rows(plain.trainer)[-1]["train/fitnet_loss"], rel=1e-3
    )
    assert states_equal(weights(loud.trainer), weights(plain.trainer))
    if student == "yolov8n.yaml":  # and the share is in force
        assert not states_equal(weights(distil(teacher, tiny | {"balance": 0.6}).trainer), weights(plain.trainer))


def test_the_share_is_in_force_at_each_level() -> None:
    """By the gradients themselves, where levels' losses are far apart: P3's measure must not hold the others'."""
    teacher, student = random_detector("yolov8s.yaml"), random_detector("yolov8n.yaml", seed=1)
    student.args = get_cfg(overrides={"imgsz": 64})
    criterion = attached(teacher, student, method="fitnet+frs", balance=0.2)
    criterion.begin_epoch(0, epochs=2, steps=1)
    losses: list[list[Tensor]] = []
    apart = (1.0, 1e3, 1e6)

    def spread(_module: object, _inputs: object, found: list[Tensor]) -> list[Tensor]:
        losses.append([loss * by for loss, by in zip(found, apart, strict=True)])
        return losses[-1]

    for method in criterion.stage.methods:
        method.register_forward_hook(spread)
    batch = two_images()
    preds = student(batch["img"])
    criterion(preds, batch)
    maps = preds["feats"]
    task = gradients(criterion.base(preds, batch)[0].sum(), maps)
    gains = criterion.stage.gains(torch.ones(2))
    for own, in_force in zip(losses, gains, strict=True):
        scaled = [2 * gain * loss for gain, loss in zip(in_force, own, strict=True)]  # a loss counts for each image
        alone = torch.cat([gradients(loss, [m]) for loss, m in zip(scaled, maps, strict=True)])
        assert torch.allclose(alone / task, torch.tensor(0.2), rtol=1e-3)
        together = gradients(torch.stack(scaled).sum(), maps) / task  # with what comes back from coarser maps
        assert ((together > 0.15) & (together < 0.35)).all()


def gradients(loss: Tensor, maps: list[Tensor]) -> Tensor:
    """The norm of a loss's gradient at each map."""
    return torch.stack([g.norm() for g in torch.autograd.grad(loss, maps, retain_graph=True)])


@pytest.mark.parametrize("level_weights", ["uniform", "confidence"])
def test_the_measured_share_is_the_chosen_one(level_weights: str, tiny: dict[str, Any], teacher: str) -> None:
    tiny |= {"probe": 1000, "epochs": 1, "balance": 0.2, "level_weights": level_weights}
    row = rows(distil(teacher, tiny, method="dfd+frs", **{"frs.warmup": 0.0}).trainer)[0]
    for level in LEVELS:
        weight = 1 if level_weights == "uniform" else 3 * row[f"level/{level}/share"]
        for method in ("dfd", "frs"):
            assert row[f"level/{level}/{method}_ratio"] == pytest.approx(0.2 * weight, rel=1e-3)
            assert row[f"level/{level}/{method}_gain"] > 0


def test_a_resume_keeps_the_running_means(tiny: dict[str, Any], teacher: str) -> None:
    d = YoloDistiller(teacher=teacher, student="yolov8n.yaml", method="dfd", balance=0.3, probe=2)
    cut(d, tiny)
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


def counted_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(the teacher's identity, the batch's) of each run of a teacher in training."""
    runs: list[tuple[int, int]] = []
    run = Teacher._run

    def counted(self: Teacher, images: Tensor, *wanted: bool) -> Any:
        runs.append((max(m for m in self.pyramid.values()), images.data_ptr()))
        return run(self, images, *wanted)

    monkeypatch.setattr(Teacher, "_run", counted)
    return runs


def test_after_the_end_the_task_trains_alone(
    tiny: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = counted_runs(monkeypatch)
    keys = {"fitnet.schedule": "linear", "fitnet.warmup": 1.0, "fitnet.end": 2.0, "epochs": 4, "balance": "off"}
    d = distil(teacher, tiny | keys)
    found = rows(d.trainer)
    # three steps an epoch: a ramp of 0, 1/3, 2/3, then a fall of 1, 2/3, 1/3, then nothing
    assert [r["train/fitnet_gain"] for r in found] == pytest.approx([5 * 1 / 3, 5 * 2 / 3, 0, 0], rel=1e-3)
    assert found[0]["train/fitnet_loss"] > 0
    assert found[2]["train/fitnet_loss"] == 0
    assert found[0]["level/P3/fitnet_gain"] > 0
    assert [found[2][f"level/P3/fitnet_{what}"] for what in ("grad", "ratio", "gain")] == [0, 0, 0]
    assert found[2]["level/P3/task_grad"] > 0  # as it was measured last
    assert len(runs) == 5  # the teacher does not run where nothing is distilled


def test_teachers_take_turns_and_a_resume_goes_on_in_its_stage(
    tiny: dict[str, Any], teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weak = str(save_checkpoint(random_detector("yolov8n.yaml", seed=4), tmp_path / "weak.pt"))
    runs = counted_runs(monkeypatch)
    tiny |= {"epochs": 4, "stages": [3], "probe": 2}
    distil([weak, teacher], tiny, method="dfmsd+dfd")
    assert [channels for channels, _ in runs] == [256] * 9 + [512] * 3
    runs.clear()

    d = YoloDistiller(teacher=[weak, teacher], student="yolov8n.yaml", method="dfmsd", teacher_precision="fp32")
    cut(d, tiny, epoch=2)
    assert {channels for channels, _ in runs} == {256}
    runs.clear()
    YoloDistiller().train(resume=str(d.trainer.save_dir))
    assert [channels for channels, _ in runs] == [512] * 3


def test_stages_are_evenly_spread(tiny: dict[str, Any], teacher: str, tmp_path: Path, monkeypatch: Any) -> None:
    weak = str(save_checkpoint(random_detector("yolov8n.yaml", seed=4), tmp_path / "weak.pt"))
    runs = counted_runs(monkeypatch)
    distil([weak, teacher], tiny, check_teacher=True)
    assert [channels for channels, _ in runs] == [256] * 3 + [512] * 3


def test_pictures_without_boxes_and_crowds_train(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    """fgd and dfmsd read the batch's boxes: none, hundreds, some of them a line after rounding."""
    path = write_dataset(tmp_path / "odd", train=8)
    labels = sorted((tmp_path / "odd" / "labels" / "train").glob("*.txt"))
    for empty in labels[:5]:
        empty.write_text("")
    lines = [f"0 {i % 20 / 20 + 0.02} {i // 20 / 20 + 0.02} {0.04 if i % 7 else 0.0001} 0.04" for i in range(300)]
    labels[5].write_text("\n".join(lines))
    found = rows(distil(teacher, tiny | {"data": str(path), "mosaic": 0.0}, method="fgd+dfmsd", balance=0.3).trainer)
    assert all(math.isfinite(row[f"train/{name}_loss"]) and row[f"train/{name}_loss"] > 0
               for row in found for name in ("fgd", "dfmsd"))  # fmt: skip
