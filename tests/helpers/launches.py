"""Trainings in processes of their own, started as Ultralytics, torchrun or a user start them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from helpers.models import YOLOV8N
from helpers.results import saved_weights
from helpers.runs import TINY

PROGRAM = str(Path(__file__).with_name("programs") / "launched_training.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def settings(data: str, teacher: str, folder: Path, **more: Any) -> dict[str, Any]:
    """Return the settings of a training of three epochs in `folder`."""
    distillation = {
        "teacher": teacher,
        "teacher_precision": "fp32",
        "check_teacher": False,
        "method": "dfd+pdf",
        "probe": 2,
    }
    length = {"epochs": 3, "close_mosaic": 1, "deterministic": True, "device": "cpu", "val": True}
    files = {"data": data, "model": YOLOV8N, "save_dir": str(folder)}
    return {**TINY, **distillation, **length, **files, "level_weights": "uniform", **more}


def launch(keys: dict[str, Any], *before: str, core: int | None = None, **env: str) -> subprocess.Popen[str]:
    """Start the program with settings `keys`. before: a launcher. env: the program's environment variables."""
    command = [*before, PROGRAM, json.dumps(keys)] if before else [sys.executable, PROGRAM, json.dumps(keys)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **env},
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip


def output_of(process: subprocess.Popen[str], status: int = 0) -> str:
    """Wait for a process, and return what it printed; fail if it ends with another status."""
    output, _ = process.communicate(timeout=120)
    assert process.returncode == status, output[-4000:]
    return output


def last_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the state_dict of a run's last checkpoint."""
    return saved_weights(folder / "weights" / "last.pt")


def assert_processes_agree(folder: Path) -> None:
    """Fail if two processes ended an epoch with different weights, adapters or gains."""
    first, second = (torch.load(folder / f"tensors-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert any(key.endswith("balance.pull") for key in first)
    normalization = ("running_mean", "running_var")  # each process has its own images
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first if not k.endswith(normalization))
