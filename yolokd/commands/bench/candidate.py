"""One way to train, whose training steps are run and timed one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.commands.candidates import NATIVE, PLAIN, constant_applies
from yolokd.config.parse import split_keys
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
    """The settings that all candidates of one comparison share."""

    teacher: str  # path of a checkpoint
    student: str
    imgsz: int
    batch: int
    data: str
    folder: str  # for the run folders that trainers create
    other_keys: tuple[tuple[str, Any], ...] = ()  # other keys of `yolokd train`

    def keys(self, amp: object, name: str) -> dict[str, Any]:
        """Return the keys of one training, both Ultralytics' and yolokd's. name: of the run folder."""
        shared = {"model": self.student, "imgsz": self.imgsz, "batch": self.batch, "nbs": self.batch, "data": self.data}
        fixed = {"plots": False, "val": False, "verbose": False, "save": False, "epochs": 2, "close_mosaic": 0}
        return dict(self.other_keys) | shared | fixed | {"amp": amp, "save_dir": f"{self.folder}/{name}"}


@dataclass
class StepSeconds:
    """The seconds of one step: in total, waiting for data, and running the teacher."""

    step: float
    data: float
    teacher: float


class Candidate:
    """A trainer that is ready to train, and runs one step per call.

    method: a method or composition, PLAIN, NATIVE or NATIVE_ALL. Raises UserError for what cannot be trained.
    """

    def __init__(self, setting: BenchSetting, method: str, amp: object) -> None:
        self.method, self.amp, self.batch = method, str(amp), setting.batch
        keys = setting.keys(amp, f"{method}-{amp}".replace(", ", "-"))
        self.trainer: Any = (
            build_native_trainer(setting, keys)
            if method.startswith(NATIVE)
            else build_yolokd_trainer(setting, keys, method)
        )
        with bfloat16_on_cpu(), safe_loading(bool(dict(setting.other_keys).get("trust"))):
            self.trainer._setup_train()
        self.trainer._model_train()
        # A benchmark may take more steps than fit into two epochs. After the last epoch a scheduled gain would be 0,
        # and the teacher would no longer run.
        self.trainer.epoch, self.trainer.epochs = 0, ENDLESS
        self.trainer.run_callbacks("on_train_epoch_start")
        self.threads = training_threads() if method == NATIVE_ALL else torch.get_num_threads()
        if len(self.trainer.train_loader.dataset) < setting.batch:
            raise UserError(f"batch={setting.batch}", "is larger than the training set", "use more images")
        self._batches = self._endless_batches()
        self._teacher_seconds = 0.0
        self._time_teacher()

    def _endless_batches(self) -> Iterator[Any]:
        """Yield full batches, epoch after epoch."""
        while True:
            yield from (batch for batch in self.trainer.train_loader if len(batch["img"]) == self.batch)

    def step(self) -> StepSeconds:
        """Run one step as Ultralytics' loop does: forward, loss, backward, clipping, optimizer, EMA."""
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
        return StepSeconds(self._now() - started, loaded - started, self._teacher_seconds)

    def _now(self) -> float:
        return clock(self.trainer.device)

    def _time_teacher(self) -> None:
        """Measure the teacher's seconds; not on CUDA, where the teacher runs at the same time as the student."""
        if self.trainer.device.type == "cuda":
            return
        model = unwrap_model(self.trainer.model)
        if isinstance(model, DistillationModel):
            model.teacher_model.forward = self._timed(model.teacher_model.forward)
        elif self.trainer.criterion is not None:
            teacher = self.trainer.criterion.stage.teacher
            vars(teacher)["_run"] = self._timed(teacher._run)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its seconds are added to the teacher's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            output = run(*args, **kwargs)
            self._teacher_seconds += time.perf_counter() - started
            return output

        return timed


class TeacherAlone:
    """The backbone and neck of a candidate's teacher, run alone on one random batch."""

    def __init__(self, candidate: Candidate) -> None:
        trainer = candidate.trainer
        self._teacher, self._threads = trainer.criterion.stage.teacher, candidate.threads
        size = trainer.args.imgsz
        self._images = torch.rand(candidate.batch, trainer.data["channels"], size, size).to(trainer.device)
        self._now = candidate._now

    def step(self) -> StepSeconds:
        """Run one forward pass."""
        torch.set_num_threads(self._threads)
        started = self._now()
        self._teacher(self._images)
        seconds = self._now() - started
        return StepSeconds(seconds, 0.0, seconds)


def build_yolokd_trainer(setting: BenchSetting, keys: Mapping[str, Any], method: str) -> DistillationTrainer:
    """Build yolokd's trainer of a method, without the constants of other methods."""
    overrides = {k: v for k, v in keys.items() if constant_applies(k, method)}
    teacher = {"teacher": setting.teacher} if method != PLAIN else {}
    return DistillationTrainer(overrides=overrides | teacher | {"method": method, "check_teacher": False})


def build_native_trainer(setting: BenchSetting, keys: Mapping[str, Any]) -> DetectionTrainer:
    """Build Ultralytics' own trainer with its own distillation, without yolokd's keys."""
    overrides = split_keys(keys).ultralytics
    return DetectionTrainer(overrides=overrides | {"distill_model": setting.teacher})
