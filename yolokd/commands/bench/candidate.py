"""One way to train, whose training steps are run and timed one at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle, islice, repeat
from typing import Any, TypeAlias

import torch
from torch import Tensor
from ultralytics.engine import trainer as engine
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.commands.candidates import NATIVE, PLAIN, constant_applies
from yolokd.config.parse import split_keys
from yolokd.errors import UserError
from yolokd.models.checkpoint import student_task
from yolokd.models.tasks import TASKS
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.teacher import Teacher
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.training_loop import bfloat16_on_cpu
from yolokd.runtime.threads import training_threads
from yolokd.training.tasks import make_trainer
from yolokd.training.trainer import DistillationTrainer

NATIVE_ALL = f"{NATIVE}, all cores"
ENDLESS = 10**9  # epochs
FIXED = {"plots": False, "val": False, "verbose": False, "save": False, "epochs": 2, "close_mosaic": 0}  # settings
REPLAYED = 4  # batches that a benchmark on CUDA repeats: the time of data loading would hide that of the GPU
Moment: TypeAlias = Any  # seconds as a float, or a CUDA event


@dataclass(frozen=True)
class BenchSetting:
    """The settings that all candidates of one comparison share."""

    teachers: tuple[str, ...]  # paths of checkpoints; several teach at once
    student: str
    imgsz: int
    batch: int
    data: str
    folder: str  # for the run folders that trainers create
    other_keys: tuple[tuple[str, Any], ...] = ()  # other keys of `yolokd train`

    def keys(self, amp: object, name: str) -> dict[str, Any]:
        """Return the keys of one training, both Ultralytics' and yolokd's. name: of the run folder."""
        shared = {"model": self.student, "imgsz": self.imgsz, "batch": self.batch, "nbs": self.batch, "data": self.data}
        return dict(self.other_keys) | shared | FIXED | {"amp": amp, "save_dir": f"{self.folder}/{name}"}


@dataclass
class StepSeconds:
    """The seconds of one step: in total, waiting for data, running the teacher, and in the distillation losses.

    teacher: on CUDA those that the student waits for it, since both run at the same time. methods: of the losses and of
    their backward pass, up to the student's maps and predictions.
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
        self._teacher_runs: list[tuple[Moment, Moment]] = []  # in this step: when each began and ended
        self._runs_before_losses = 0  # of these
        self._methods_begin: Moment | None = None  # in this step: when the YOLO loss is computed,
        self._methods_end: Moment | None = None  # and when its backward pass begins, after those of the methods
        self._time_teacher()
        self._time_methods()

    def _endless_batches(self) -> Iterator[Any]:
        """Yield full batches, epoch after epoch; on CUDA the first ones again and again."""
        epochs = chain.from_iterable(repeat(self.trainer.train_loader))
        full: Iterator[Any] = (batch for batch in epochs if len(batch["img"]) == self.batch)
        if self.trainer.device.type == "cuda":
            full = cycle(list(islice(full, REPLAYED)))
        return (dict(batch) for batch in full)  # a trainer replaces what is in a batch by what is on its device

    def step(self) -> StepSeconds:
        """Run one step as Ultralytics' loop does: forward, loss, backward, clipping, optimizer, EMA."""
        torch.set_num_threads(self.threads)
        trainer = self.trainer
        started = self._now()
        batch = next(self._batches)
        loaded = self._now()
        self._teacher_runs, self._methods_begin, self._methods_end = [], None, None
        amp = torch.bfloat16 if trainer.args.amp == "bf16" else trainer.amp
        with bfloat16_on_cpu(), engine.autocast(amp, device=trainer.device.type):
            loss, _ = trainer.model(trainer.preprocess_batch(batch))
        trainer.scaler.scale(loss.sum()).backward()
        trainer.optimizer_step()
        step = self._now() - started
        return StepSeconds(step, loaded - started, _seconds(self._teacher_runs), self._methods_seconds())

    def _now(self) -> float:
        """Return the time in seconds, after the device has finished its queued work."""
        if self.trainer.device.type == "cuda":
            torch.cuda.synchronize(self.trainer.device)
        return time.perf_counter()

    def _time_teacher(self) -> None:
        """Note when the teacher runs; on CUDA, when the student waits for its output."""
        model = unwrap_model(self.trainer.model)
        if isinstance(model, DistillationModel):
            model.teacher_model.forward = self._timed(model.teacher_model.forward)
        elif self.trainer.criterion is not None:
            for teacher in teachers_of(self):
                if self.trainer.device.type == "cuda":
                    vars(teacher._side_stream)["collect"] = self._timed(teacher._side_stream.collect)
                else:
                    vars(teacher)["_run"] = self._timed(teacher._run)

    def _timed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function so that its seconds count as the teacher's."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._moment()
            output = run(*args, **kwargs)
            self._teacher_runs.append((started, self._moment()))
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
            output = compute(*args, **kwargs)
            losses = next(iter(output.values())) if isinstance(output, dict) else output[0]  # an RT-DETR's, a YOLO's
            if losses.requires_grad:
                losses.register_hook(end)
            self._methods_begin, self._runs_before_losses = self._moment(), len(self._teacher_runs)
            return output

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
        return _seconds([(begin, end)]) - _seconds(self._teacher_runs[self._runs_before_losses :])


def _seconds(spans: Sequence[tuple[Moment, Moment]]) -> float:
    """Return the sum of the lengths of some spans of time; the device has reached their ends."""
    lengths = (end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000 for begin, end in spans)
    return float(sum(lengths))


def teachers_of(candidate: Candidate) -> list[Teacher]:
    """Return the teachers that teach in a candidate's steps: one, or those of an ensemble."""
    return [stage.teacher for stage in candidate.trainer.criterion.active]


class TeacherAlone:
    """A candidate's teacher, or its ensemble, alone on one random batch, with the requested outputs of its head."""

    def __init__(self, candidate: Candidate, requested: RequestedOutputs) -> None:
        trainer = candidate.trainer
        self._teachers, self._threads, self._requested = teachers_of(candidate), candidate.threads, requested
        size = trainer.args.imgsz
        self._images = torch.rand(candidate.batch, trainer.data["channels"], size, size).to(trainer.device)
        self._now = candidate._now

    def step(self) -> StepSeconds:
        """Run one forward pass of each teacher."""
        torch.set_num_threads(self._threads)
        started = self._now()
        for teacher in self._teachers:
            teacher(self._images, self._requested)
        seconds = self._now() - started
        return StepSeconds(seconds, 0.0, seconds)


def requested_outputs(candidate: Candidate) -> RequestedOutputs | None:
    """Return what a candidate's method needs of the teacher's head; None if there is no teacher."""
    if candidate.method.startswith(NATIVE):
        return RequestedOutputs(mean_logits=True)
    criterion = candidate.trainer.criterion
    return criterion.stage.requested_outputs(measuring=False) if criterion is not None else None


def busy_seconds(stepper: Candidate | TeacherAlone, steps: int = 5) -> float:
    """Return the seconds of a step in which a GPU works: all its streams together, from a profile of some steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            stepper.step()
    work = (e for e in profile.events() or () if e.device_type.name == "CUDA" and not e.is_user_annotation)
    return covered_length([(e.time_range.start, e.time_range.end) for e in work]) / 1e6 / steps


def covered_length(spans: Sequence[tuple[float, float]]) -> float:
    """Return the length of the union of some spans.

    >>> covered_length([(5, 6), (0, 2), (1, 3)])
    4.0
    """
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def build_yolokd_trainer(setting: BenchSetting, keys: Mapping[str, Any], method: str) -> DistillationTrainer:
    """Build yolokd's trainer of a method, without the constants of other methods."""
    overrides = {k: v for k, v in keys.items() if constant_applies(k, method)}
    together = {"teachers": "ensemble"} if len(setting.teachers) > 1 else {}
    teacher = {"teacher": list(setting.teachers)} | together if method != PLAIN else {}
    quiet = {"check_teacher": False, "report": False}
    return make_trainer(overrides | teacher | {"method": method, **quiet})


def build_native_trainer(setting: BenchSetting, keys: Mapping[str, Any]) -> Any:
    """Build Ultralytics' own trainer with its own distillation, without yolokd's keys; it takes the last teacher."""
    overrides = split_keys(keys).ultralytics
    trainer = TASKS[student_task(setting.student, bool(keys.get("trust")))].trainer
    return trainer(overrides=overrides | {"distill_model": setting.teachers[-1]})
