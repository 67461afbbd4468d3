"""`yolokd bench` on tiny models, and SL2 compared with Ultralytics' distillation loss."""

from __future__ import annotations

import csv
import re
import shutil
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from helpers.data import two_images
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, attach_criterion, random_detector
from ultralytics.cfg import get_cfg
from ultralytics.nn.distill_model import DistillationModel

from yolokd import UserError
from yolokd.commands import bench
from yolokd.commands.bench import run_bench
from yolokd.commands.bench.candidate import BenchSetting, Candidate, StepSeconds
from yolokd.commands.bench.memory import peak_mib
from yolokd.commands.bench.rounds import Rounds

CPU = (("device", "cpu"),)


@pytest.mark.parametrize("cfg", [YOLOV8N, YOLO26N])
def test_sl2_equals_the_loss_of_ultralytics_distill_model(cfg: str) -> None:
    """Compare the whole computation, from images to the loss, with the same projectors."""
    teacher, student = random_detector(cfg.replace("n.", "s.")), random_detector(cfg, seed=1)
    student.args = get_cfg(overrides={"imgsz": 64})
    batch = two_images()
    native = DistillationModel(deepcopy(teacher), deepcopy(student)).train()
    _, items = native.loss(batch)

    criterion = attach_criterion(teacher, student, method="sl2", **{"sl2.gain": 6.0 * 3})  # three levels
    for method, projector in zip(criterion.stage.methods[0], native.projector, strict=True):
        method.project.load_state_dict(projector.state_dict())
    losses, _ = criterion(student(batch["img"]), batch)
    assert float(losses[-1].detach()) / 2 == pytest.approx(float(items["dis_loss"]), rel=1e-3)


def test_bench_measures_every_candidate(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "TOLERANCE", -1.0)  # no real epoch agrees with the benchmark
    out = run_bench(
        teacher=f"{YOLOV8N},{YOLOV8S}", imgsz=32, batch=2, method="native,dfd+sl2", amp="False,bf16", rounds=2,
        data=data, project=str(tmp_path), memory=False, device="cpu",
    )  # fmt: skip
    with open(out / "bench.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert {(r["teacher"], r["candidate"], r["amp"]) for r in rows} >= {
        (t, c, a)
        for t in (YOLOV8N, YOLOV8S)
        for c, a in (
            ("none", "False"),
            ("none", "bf16"),
            ("native", "False"),
            ("dfd+sl2", "False"),
            ("dfd+sl2", "bf16"),
        )
    }
    for row in rows:
        assert float(row["fastest"]) <= float(row["step"]) <= float(row["slowest"])
        assert float(row["images_per_second"]) == pytest.approx(2 / float(row["step"]), rel=0.01)
        assert (float(row["teacher_seconds"]) > 0) == (row["candidate"] != "none")
        assert float(row["times_native"]) > 0
        assert (row["times_bound"] != "") == (row["candidate"] != "none")
        assert (float(row["methods"]) > 0) == (row["candidate"] != "none")
    told = capsys.readouterr().out
    assert "DISAGREES with" in told
    assert re.search(r"dfd\+sl2: a step that measures gradients takes -?\d+% longer", told)
    red = (cv2.imread(str(out / "bench.png")) == (0, 0, 255)).all(-1)
    assert red.sum() > 100  # the warning in the plot


class Slow(torch.autograd.Function):
    """Returns its input, and sleeps in both directions."""

    @staticmethod
    def forward(_ctx: Any, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return gradient


def slow_down(module: torch.nn.Module) -> None:
    """Let a module return its output late, and pass its gradient on late."""
    module.register_forward_hook(lambda _module, _inputs, output: Slow.apply(output))


@pytest.mark.parametrize("method", ["fitnet", "native"])
def test_the_losses_of_a_step_and_their_backward_count_to_its_methods(
    method: str, data: str, teacher: str, tmp_path: Path
) -> None:
    candidate = Candidate(BenchSetting((teacher,), YOLOV8N, 32, 2, data, str(tmp_path), CPU), method, amp=False)
    model = candidate.trainer.model
    student = model.student_model if method == "native" else model
    slow_down(student.model[0])
    assert seconds_of_student(candidate.step()) >= 0.4
    slow_down(model.projector[0] if method == "native" else model.criterion.stage.methods[0][0])
    seconds = candidate.step()
    assert seconds.methods >= 0.4
    assert seconds_of_student(seconds) >= 0.4


def seconds_of_student(seconds: StepSeconds) -> float:
    return seconds.step - seconds.data - seconds.teacher - seconds.methods


def test_the_parts_of_a_step_are_those_of_its_own_candidate() -> None:
    """A plain step that was slow, on a machine that was busy, says nothing about the others."""
    times = Rounds()
    for _ in range(3):
        times.add("none False", StepSeconds(3.8, 0.01, 0))
        times.add("dfd False", StepSeconds(0.22, 0.01, 0.05, 0.04))
    parts = times.parts("dfd False")
    assert parts == {"data": 0.01, "teacher_seconds": 0.05, "student": pytest.approx(0.12), "methods": 0.04}


def test_peak_memory_is_measured_in_a_new_process(data: str, tmp_path: Path) -> None:
    ballast = torch.ones(2**28)  # 1 GiB in this process must not count
    out = run_bench(
        imgsz=32, batch=2, method="none,fitnet", rounds=1, teacher=YOLOV8N, data=data, project=str(tmp_path), name=7,
        device="cpu",
    )  # fmt: skip
    assert out == tmp_path / "7"
    with open(out / "bench.csv", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    assert [row["candidate"] for row in rows] == ["none", "fitnet"]
    assert all(100 < float(row["peak_mib"]) < ballast.nbytes / 2**20 + 200 for row in rows)


def test_a_process_that_dies_has_no_peak_memory(data: str, teacher: str, tmp_path: Path) -> None:
    file = Path(shutil.copy(teacher, tmp_path / "t.pt"))
    setting = BenchSetting((str(file),), YOLOV8N, imgsz=32, batch=2, data=data, folder=str(tmp_path), other_keys=CPU)
    candidate = Candidate(setting, "fitnet", amp=False)
    file.unlink()
    assert peak_mib(setting, candidate) is None


def test_the_teacher_also_runs_in_steps_beyond_the_last_epoch(data: str, teacher: str, tmp_path: Path) -> None:
    setting = BenchSetting(
        (teacher,), YOLOV8N, imgsz=32, batch=12, data=data, folder=str(tmp_path), other_keys=CPU
    )  # one step an epoch
    candidate = Candidate(setting, "dfd", amp=False)
    assert all(candidate.step().teacher > 0 for _ in range(4))


def test_ratios_compare_steps_of_the_same_round() -> None:
    """A machine that is slow in one round is slow for all candidates of it."""
    rounds = Rounds()
    for slow in (1, 10, 100):
        rounds.add("a", StepSeconds(4.0 * slow, 0, 0))
        rounds.add("b", StepSeconds(1.0 * slow, 0, 0))
        rounds.add("c", StepSeconds(1.0 * slow, 0, 0))
    assert rounds.ratio("a", "b", "c") == 2
    assert rounds.median("a") == 40


@pytest.mark.parametrize(
    "keys",
    [
        {"rounds": 0},
        {"method": "dfx"},
        {"method": "none,native", "teacher": "nothere.pt"},
        {"epoch": 3},
        {"imgsz": "wide"},
        {"pdf.distance": "l1"},
        {"batch": 64},
        {"teacher": "yolov8n-cls.yaml"},
        {"student": "rtdetr-l.yaml", "method": "native"},
        {"project": __file__},
        {"teachers": "ensmble"},
        {"teachers": "ensemble"},
        {"epochs": 3},
        {"cfg": "nowhere.yaml"},
    ],
)
def test_bad_input_is_refused_before_anything_is_written(keys: dict[str, object], data: str, tmp_path: Path) -> None:
    valid = {"teacher": YOLOV8N, "method": "dfd", "data": data, "project": str(tmp_path / "p"), "device": "cpu"}
    with pytest.raises(UserError):
        run_bench(**valid | keys)  # type: ignore[arg-type]
    assert not (tmp_path / "p").exists()


def test_native_is_refused_for_models_of_other_strides(data: str, tmp_path: Path) -> None:
    keys = {"teacher": YOLOV8N, "student": "yolov8n-p2.yaml", "data": data, "project": str(tmp_path / "p")}
    with pytest.raises(UserError, match="method=native: needs equal strides"):
        run_bench(**keys, method="native", imgsz=64, batch=2, device="cpu")  # type: ignore[arg-type]
