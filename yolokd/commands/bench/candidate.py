"""One way to train, whose steps are run and timed one at a time from outside."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.commands.candidates import NATIVE, PLAIN, constant_applies
from yolokd.config.parse import is_yolokd_key
from yolokd.errors import UserError
from yolokd.models.precision import clock
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.training_loop import bfloat16_on_cpu
from yolokd.runtime.threads import training_threads
from yolokd.training.trainer import DistillationTrainer

NATIVE_ALL = f"{NATIVE}, all cores"
ENDLESS = 10**9  # epochs


@dataclass(frozen=True)
class BenchSetting:
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
        return dict(self.rest) | fixed | quiet | {"amp": amp, "save_dir": f"{self.folder}/{name}"}


@dataclass
class Seconds:
    """Of one step: all of it, and what of it waited for data and ran the teacher."""

    step: float
    data: float
    teacher: float


class Candidate:
    """A trainer, set up by itself, whose steps are run one at a time from outside."""

    def __init__(self, setting: BenchSetting, method: str, amp: object) -> None:
        self.method, self.amp, self.batch = method, str(amp), setting.batch
        keys = setting.keys(amp, f"{method}-{amp}".replace(", ", "-"))
        self.trainer: Any = (
            _native_trainer(setting, keys) if method.startswith(NATIVE) else our_trainer(setting, keys, method)
        )
        with bfloat16_on_cpu(), safe_loading(bool(dict(setting.rest).get("trust"))):
            self.trainer._setup_train()
        self.trainer._model_train()
        # Steps go on past the keys' two epochs, after which a gain would have fallen to 0 and no teacher would run.
        self.trainer.epoch, self.trainer.epochs = 0, ENDLESS
        self.trainer.run_callbacks("on_train_epoch_start")
        self.threads = training_threads() if method == NATIVE_ALL else torch.get_num_threads()
        if len(self.trainer.train_loader.dataset) < setting.batch:
            raise UserError(f"batch={setting.batch}", "is larger than the training set", "use more images")
        self._batches = self._endless()
        self._teacher_seconds = 0.0
        self._watch_teacher()

    def _endless(self) -> Iterator[Any]:
        """Full batches, epoch after epoch."""
        while True:
            yield from (batch for batch in self.trainer.train_loader if len(batch["img"]) == self.batch)

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
        return clock(self.trainer.device)

    def _watch_teacher(self) -> None:
        """Add up the seconds of the teacher; on CUDA, where it overlaps the student, they would mean nothing."""
        if self.trainer.device.type == "cuda":
            return
        model = unwrap_model(self.trainer.model)
        if isinstance(model, DistillationModel):
            model.teacher_model.forward = self._timed(model.teacher_model.forward)
        elif self.trainer.criterion is not None:
            teacher = self.trainer.criterion.stage.teacher
            vars(teacher)["_run"] = self._timed(teacher._run)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = run(*args, **kwargs)
            self._teacher_seconds += time.perf_counter() - started
            return output

        return timed


class TeacherAlone:
    """A contender's teacher, backbone and neck alone, on one batch of its own."""

    def __init__(self, contender: Candidate) -> None:
        trainer = contender.trainer
        self._teacher, self._threads = trainer.criterion.stage.teacher, contender.threads
        size = trainer.args.imgsz
        self._images = torch.rand(contender.batch, trainer.data["channels"], size, size).to(trainer.device)
        self._now = contender._now

    def step(self) -> Seconds:
        """One forward pass."""
        torch.set_num_threads(self._threads)
        started = self._now()
        self._teacher(self._images)
        seconds = self._now() - started
        return Seconds(seconds, 0.0, seconds)


def our_trainer(setting: BenchSetting, keys: Mapping[str, Any], method: str) -> DistillationTrainer:
    """A trainer of `method`, with those of the constants that are its own."""
    own = {k: v for k, v in keys.items() if constant_applies(k, method)}
    teacher = {"teacher": setting.teacher} if method != PLAIN else {}
    return DistillationTrainer(overrides=own | teacher | {"method": method, "check_teacher": False})


def _native_trainer(setting: BenchSetting, keys: Mapping[str, Any]) -> DetectionTrainer:
    theirs = {k: v for k, v in keys.items() if not is_yolokd_key(k)}
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
