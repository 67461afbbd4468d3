"""One way to train, whose training steps are run and timed one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
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
Moment: TypeAlias = Any  # seconds as a float, or a CUDA event


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
    """The seconds of one step: in total, waiting for data, running the teacher, and in the distillation losses.

    methods: of the losses and of their backward pass, up to the student's maps and predictions.
    """

    step: float
    data: float
    teacher: float
    methods: float = 0.0


class Candidate:
    """A trainer that is ready to train, and runs one step per call.

    method: a method or composition, PLAIN, NATIVE or NATIVE_ALL. Raises UserError for what cannot be trained.
    """

    def __init__(self, setting: BenchSetting, method: str, amp: object) -> None:
        self.method, self.amp, self.batch = method, str(amp), setting.batch
        keys = setting.keys(amp, f"{method}-{amp}".replace(", ", "-"))
        with bfloat16_on_cpu(), safe_loading(bool(dict(setting.other_keys).get("trust"))):
            self.trainer: Any = (
                build_native_trainer(setting, keys)
                if method.startswith(NATIVE)
                else build_yolokd_trainer(setting, keys, method)
            )
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
        self._teacher_seconds = self._teacher_before = 0.0  # in this step, and in it before its losses
        self._methods_begin: Moment | None = None  # in this step: when the YOLO loss is computed,
        self._methods_end: Moment | None = None  # and when its backward pass begins, after those of the methods
        self._time_teacher()
        self._time_methods()

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
        self._teacher_seconds, self._methods_begin, self._methods_end = 0.0, None, None
        amp = torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp
        with bfloat16_on_cpu(), engine.autocast(amp, device=trainer.device.type):
            loss, _ = trainer.model(trainer.preprocess_batch(batch))
        trainer.scaler.scale(loss.sum()).backward()
        trainer.optimizer_step()
        step = self._now() - started
        return StepSeconds(step, loaded - started, self._teacher_seconds, self._methods_seconds())

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

    def _time_methods(self) -> None:
        """Note, in each step, when the YOLO loss is computed and when its backward pass begins.

        Both trainers compute the distillation losses after the YOLO loss, and autograd runs the backward of what was
        computed last first. So all between these two moments is distillation.
        """
        model = unwrap_model(self.trainer.model)
        if isinstance(model, DistillationModel):
            model.student_model.loss = self._noting_loss(model.student_model.loss)
        elif self.trainer.criterion is not None:
            self.trainer.criterion.base = self._noting_loss(self.trainer.criterion.base)

    def _noting_loss(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the function that computes the YOLO loss."""

        def end(_gradient: Tensor) -> None:
            self._methods_end = self._moment()

        def noting(*args: Any, **kwargs: Any) -> Any:
            losses, items = compute(*args, **kwargs)
            if losses.requires_grad:
                losses.register_hook(end)
            self._methods_begin, self._teacher_before = self._moment(), self._teacher_seconds
            return losses, items

        return noting

    def _moment(self) -> Moment:
        """Return the present moment; on CUDA as an event, because waiting for the device would slow the step down."""
        if self.trainer.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _methods_seconds(self) -> float:
        begin, end = self._methods_begin, self._methods_end
        if begin is None or end is None:
            return 0.0
        if isinstance(begin, float):
            return float(end) - begin - (self._teacher_seconds - self._teacher_before)
        return float(begin.elapsed_time(end)) / 1000


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
