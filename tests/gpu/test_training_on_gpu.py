"""Trainings on a GPU, under AMP and with a gradient scaler, as CUDA's defaults are; and on two of them."""

from __future__ import annotations

import math
import signal
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.launches import TORCHRUN, assert_processes_agree, last_weights, launch, output_of, settings
from helpers.models import YOLOV8N
from helpers.results import repeatable_rows, rows, states_equal, weights
from helpers.runs import captured_log, train_one_epoch, train_plainly

from yolokd import YoloDistiller
from yolokd.methods import registered
from yolokd.models.teachers.outputs import TeacherOutput
from yolokd.models.teachers.teacher import Teacher
from yolokd.training.resume.sidecar import sidecars

pytestmark = pytest.mark.gpu
METHODS = [name for name, method in registered().items() if method.__module__.startswith("yolokd.")]
ON_GPU = {"device": "0", "amp": True, "workers": 0}
SCALE = 2.0**8  # the usual 2^16 may overflow in the first steps, which would count as dropped


def with_small_scale(distiller: YoloDistiller) -> YoloDistiller:
    """Let a training begin with a scale at which no gradient overflows."""

    def use_scaler(trainer: Any) -> None:
        assert trainer.scaler.is_enabled()
        trainer.scaler = torch.amp.GradScaler("cuda", init_scale=SCALE)

    distiller.add_callback("on_pretrain_routine_end", use_scaler)
    return distiller


def test_method_none_equals_plain_training(on_gpu: dict[str, Any]) -> None:
    ours = YoloDistiller(student=YOLOV8N, method="none")
    ours.train(**on_gpu)
    theirs = train_plainly(YOLOV8N, on_gpu)
    assert ours.trainer.scaler.is_enabled()
    assert states_equal(weights(ours.trainer), weights(theirs))
    assert states_equal(ours.trainer.ema.ema.state_dict(), theirs.ema.ema.state_dict())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_under_amp(method: str, on_gpu: dict[str, Any], teacher: str) -> None:
    before: dict[str, torch.Tensor] = {}
    d = with_small_scale(YoloDistiller(teacher=teacher, student=YOLOV8N, method=method))
    d.add_callback("on_train_start", lambda t: before.update({k: p.clone() for k, p in t.criterion.named_parameters()}))
    d.train(**on_gpu | {"check_teacher": True})
    trainer = d.trainer
    assert trainer.criterion.stage.teacher.settings.dtype in (torch.float16, torch.bfloat16)
    assert all(row[f"train/{method}_loss"] > 0 and row["distill/dropped"] == 0 for row in rows(trainer))
    assert all(torch.isfinite(v).all() for v in weights(trainer).values())
    # Of two dimensions and more: a bias has no gradient where a method removes means.
    adapters = {k: p for k, p in trainer.criterion.named_parameters() if p.ndim > 1}
    assert all(torch.isfinite(p).all() and not p.equal(before[k]) for k, p in adapters.items())
    kernels = [p for p in adapters.values() if p.ndim == 4 and p[0, 0].numel() > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_a_step_with_a_teacher_waits_for_the_gpu_as_often_as_one_without(on_gpu: dict[str, Any], teacher: str) -> None:
    """Of all methods together; torch warns at each operation for which the host waits."""
    plain = waits_of_the_last_step(YoloDistiller(student=YOLOV8N, method="none"), on_gpu)
    distilled = YoloDistiller(teacher=teacher, student=YOLOV8N, method="+".join(METHODS), probe=100)
    taught = waits_of_the_last_step(distilled, on_gpu)
    assert taught.total() <= plain.total() > 0, (taught - plain, plain - taught)


def waits_of_the_last_step(distiller: YoloDistiller, keys: dict[str, Any]) -> Counter[str]:
    """Train an epoch; return how often the host waited in its last step, by line of code."""
    steps: list[list[Any]] = []
    recorder = warnings.catch_warnings(record=True)

    def begin(_trainer: Any) -> None:
        steps.append(recorder.__enter__())
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")

    def end(_trainer: Any) -> None:
        nonlocal recorder
        torch.cuda.set_sync_debug_mode("default")
        recorder.__exit__(None, None, None)
        recorder = warnings.catch_warnings(record=True)

    distiller.add_callback("on_train_batch_start", begin)
    distiller.add_callback("on_train_batch_end", end)
    distiller.train(**keys | {"epochs": 1, "val": False})
    found = (warning for warning in steps[-1] if "synchroniz" in str(warning.message))
    return Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in found)


def test_a_teacher_that_is_not_finite_costs_the_distillation_of_its_steps_alone(
    on_gpu: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, steps = Teacher._run, iter(range(10**6))

    def broken(self: Teacher, *args: Any) -> TeacherOutput:
        output = run(self, *args)
        if args[0].is_cuda and len(args[0]) == on_gpu["batch"] and next(steps) in {2, 5}:
            output.maps[16][1] = math.nan
        return output

    monkeypatch.setattr(Teacher, "_run", broken)
    d = with_small_scale(YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd+pdf"))
    d.train(**on_gpu | {"teacher_precision": "fp32"})
    assert sum(row["distill/dropped"] for row in rows(d.trainer)) == 2
    assert all(torch.isfinite(v).all() for v in weights(d.trainer).values())
    assert all(torch.isfinite(p).all() for p in d.trainer.criterion.parameters())
    assert d.trainer.scaler.get_scale() == SCALE


def test_steps_that_the_gradient_scaler_skips_are_counted(on_gpu: dict[str, Any], teacher: str) -> None:
    def break_gradients(trainer: Any) -> None:
        for name, parameter in trainer.model.named_parameters():
            if parameter.requires_grad and not name.startswith("criterion."):
                parameter.register_hook(lambda gradient: gradient * math.nan)

    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet")
    d.add_callback("on_train_start", break_gradients)
    d.train(**on_gpu)
    assert [row["distill/dropped"] for row in rows(d.trainer)] == [3, 3]
    assert d.trainer.scaler.get_scale() == 2.0**16 / 2**6


def test_a_killed_run_that_resumes_ends_as_an_uninterrupted_one(data: str, teacher: str, tmp_path: Path) -> None:
    keys = ON_GPU | {"method": "mgd+pdf", "teacher_precision": "auto", "balance": 0.3}
    for folder, kill in (("whole", ""), ("killed", "-1:5")):
        run = launch(settings(data, teacher, tmp_path / folder, **keys), KILL=kill, YOLO_OFFLINE="true")
        output_of(run, status=-signal.SIGKILL if kill else 0)
    last = tmp_path / "killed" / "weights" / "last.pt"
    output_of(launch({"resume": str(last), "save_dir": str(tmp_path / "killed")}, YOLO_OFFLINE="true"))
    assert repeatable_rows(tmp_path / "killed") == repeatable_rows(tmp_path / "whole")
    assert states_equal(last_weights(tmp_path / "killed"), last_weights(tmp_path / "whole"))


def test_a_resume_with_another_number_of_gpus_says_that_it_is_not_exact(on_gpu: dict[str, Any]) -> None:
    folder = train_one_epoch(on_gpu, None, "none")
    (sidecar,) = sidecars(folder / "weights" / "last.pt")
    state = torch.load(sidecar, weights_only=True)
    state["streams"][0]["random"]["cuda"] *= 2
    torch.save(state, sidecar)
    with captured_log() as lines:
        YoloDistiller().train(resume=str(folder))
    count = torch.cuda.device_count()
    assert any(f"the run began with {2 * count} CUDA devices and now has {count}" in line for line in lines)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_with_nccl_agree_and_stop_together(data: str, teacher: str, tmp_path: Path) -> None:
    keys = ON_GPU | {"device": "0,1", "method": "dfd+mgd", "teacher_precision": "auto", "balance": 0.3}
    torchrun = (*TORCHRUN, "--standalone", "--nproc_per_node=2")
    output_of(launch(settings(data, teacher, tmp_path / "run", **keys), *torchrun, YOLO_OFFLINE="true"))
    assert len(repeatable_rows(tmp_path / "run")) == 3
    assert_processes_agree(tmp_path / "run")
    stopped = settings(data, teacher, tmp_path / "stopped", **keys | {"epochs": 50})
    output_of(launch(stopped, *torchrun, INTERRUPT="1:5", YOLO_OFFLINE="true"), status=1)
    assert [(tmp_path / "stopped" / f"batches-{rank}.txt").read_text() for rank in (0, 1)] == ["7", "7"]
