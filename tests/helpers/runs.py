"""Short trainings."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from helpers.models import YOLOV8N
from yolokd import YoloDistiller
from yolokd.config.parse import split_keys
from yolokd.runtime.threads import training_threads

# device: with a GPU, too, the tests are to test what they test without one. report: it would take longer than the rest.
TINY = {
    "imgsz": 64, "batch": 4, "nbs": 4, "plots": False, "verbose": False, "seed": 3, "patience": 50, "device": "cpu",
    "report": False,
}  # fmt: skip


def distil(teacher: Any, student: str, settings: dict[str, Any], method: str = "dfd+pdf", **more: Any) -> YoloDistiller:
    """Train a student with a teacher.

    The teacher's precision is fp32, because the choice of `auto` depends on the machine's load.
    """
    distiller = YoloDistiller(teacher=teacher, student=student, method=method)
    distiller.train(**{"teacher_precision": "fp32"} | settings | more)
    return distiller


def train_plainly(student: str, settings: dict[str, Any], **more: Any) -> Any:
    """Train with Ultralytics alone and the same settings; return the trainer.

    It uses as many cores as yolokd does: the order in which floats are summed depends on their number.
    """
    model = YOLO(student)
    model.add_callback("on_train_start", lambda _: torch.set_num_threads(training_threads()))
    model.train(**split_keys(settings).ultralytics, name="plain", **more)
    return model.trainer


class Stop(Exception):
    """Raised to end a training early."""


def train_and_stop(model: YoloDistiller | YOLO, settings: dict[str, Any], epoch: int = 0) -> None:
    """Train until the checkpoint of an epoch, counted from 0, is saved; then end as if the run had been killed."""

    def stop(trainer: Any) -> None:
        if trainer.epoch == epoch:
            raise Stop

    model.add_callback("on_model_save", stop)
    with pytest.raises(Stop):
        model.train(**settings)


def train_one_epoch(settings: dict[str, Any], teacher: str | None, method: str = "fitnet") -> Path:
    """Train until the first checkpoint is saved; return the run's folder, from which a training can resume."""
    distiller = YoloDistiller(teacher=teacher, student=YOLOV8N, method=method)
    train_and_stop(distiller, {"teacher_precision": "fp32"} | settings)
    return Path(distiller.trainer.save_dir)


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collect the lines that Ultralytics' logger writes inside the block."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)
