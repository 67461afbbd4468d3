"""One way to train, whose steps are run and timed one at a time from outside."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.config import is_own, method_names
from yolokd.trainer import THREADS, DistillationTrainer, bfloat16_on_cpu

PLAIN, NATIVE, NATIVE_ALL = "none", "native", "native, all cores"


@dataclass(frozen=True)
class Setting:
    """What is fixed while contenders take turns."""

    teacher: str  # a checkpoint
    student: str
    imgsz: int
    batch: int
    data: str
    folder: str  # for the run folders that trainers insist on
    rest: tuple[tuple[str, Any], ...] = ()  # other keys of `yolokd train`

    def keys(self, amp: object, name: str) -> dict[str, Any]:
        """Keys of training, Ultralytics' and (with a dot, or known) yolokd's."""
        fixed = {"model": self.student, "imgsz": self.imgsz, "batch": self.batch, "nbs": self.batch, "data": self.data}
        quiet = {"plots": False, "val": False, "verbose": False, "save": False, "epochs": 2, "close_mosaic": 0}
        return fixed | quiet | dict(self.rest) | {"amp": amp, "save_dir": f"{self.folder}/{name}"}


@dataclass
class Seconds:
    """Of one step: all of it, and what of it waited for data and ran the teacher."""

    step: float
    data: float
    teacher: float


class Contender:
    """A trainer, set up by itself, whose steps are run one at a time from outside."""

    def __init__(self, setting: Setting, method: str, amp: object) -> None:
        self.method, self.amp, self.batch = method, str(amp), setting.batch
        keys = setting.keys(amp, f"{method}-{amp}".replace(", ", "-"))
        self.trainer = (
            _native_trainer(setting, keys) if method.startswith(NATIVE) else our_trainer(setting, keys, method)
        )
        with bfloat16_on_cpu():
            self.trainer._setup_train()
        self.trainer._model_train()
        self.threads = THREADS if method == NATIVE_ALL else torch.get_num_threads()
        self._batches = self._endless()
        self._teacher_seconds = 0.0
        self._watch_teacher()

    def _endless(self) -> Iterator[Any]:
        while True:
            yield from self.trainer.train_loader

    def step(self) -> Seconds:
        """One step as Ultralytics' loop makes it: forward, loss, backward, clip, optimizer, EMA."""
        torch.set_num_threads(self.threads)
        trainer = self.trainer
        started = self._now()
        batch = next(self._batches)
        loaded = self._now()
        self._teacher_seconds = 0.0
        amp = torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp
        with bfloat16_on_cpu(), engine.autocast(amp, device=trainer.device.type):
            loss, _ = trainer.model(trainer.preprocess_batch(batch))
        trainer.scaler.scale(loss.sum()).backward()
        trainer.optimizer_step()
        return Seconds(self._now() - started, loaded - started, self._teacher_seconds)

    def _now(self) -> float:
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        return time.perf_counter()

    def _watch_teacher(self) -> None:
        """Add up the time in the teacher's forward; on CUDA, where it overlaps the student's, that means nothing."""
        if self.trainer.device.type == "cuda":
            return
        model = unwrap_model(self.trainer.model)
        if isinstance(model, DistillationModel):
            self._watch(model.teacher_model)
        elif self.trainer.criterion is not None:
            self._watch(self.trainer.criterion.teacher.network)

    def _watch(self, network: Any) -> None:
        def begin(*_: object) -> None:
            self._teacher_seconds -= time.perf_counter()

        def end(*_: object) -> None:
            self._teacher_seconds += time.perf_counter()

        network.register_forward_pre_hook(begin)
        network.register_forward_hook(end)


class TeacherAlone:
    """The fastest teacher of the run, forward alone, on one batch."""

    def __init__(self, contender: Contender) -> None:
        criterion = contender.trainer.criterion
        assert criterion is not None
        self._teacher, self._threads = criterion.teacher, contender.threads
        self._images: Tensor = contender.trainer.preprocess_batch(next(contender._batches))["img"]
        self._now = contender._now

    def step(self) -> Seconds:
        """One forward pass."""
        torch.set_num_threads(self._threads)
        started = self._now()
        self._teacher(self._images)
        seconds = self._now() - started
        return Seconds(seconds, 0.0, seconds)


def our_trainer(setting: Setting, keys: Mapping[str, Any], method: str) -> DistillationTrainer:
    """A trainer of `method`, with those of the constants that are its own."""
    own = {k: v for k, v in keys.items() if "." not in k or k.partition(".")[0] in method_names(method)}
    teacher = {"teacher": setting.teacher} if method != PLAIN else {}
    return DistillationTrainer(overrides=own | teacher | {"method": method, "check_teacher": False})


def _native_trainer(setting: Setting, keys: Mapping[str, Any]) -> DetectionTrainer:
    theirs = {k: v for k, v in keys.items() if not is_own(k)}
    return DetectionTrainer(overrides=theirs | {"distill_model": setting.teacher})


@contextmanager
def quiet() -> Iterator[None]:
    """Ultralytics' log held down to warnings."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
