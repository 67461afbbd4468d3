"""DistillationTrainer: builds the pieces and hands them to Ultralytics' training loop, of which it owns nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import ultralytics
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK, YAML
from ultralytics.utils.torch_utils import unwrap_model

import yolokd
from yolokd.checkpoint import as_paths, load_model, load_sidecar, restricted_loading, save_sidecar, sidecar_path
from yolokd.config import is_own
from yolokd.criterion import DistillationCriterion
from yolokd.data import data_file, sample_batch
from yolokd.errors import UserError
from yolokd.plan import KNOWN_KEYS, Lesson, Plan, make_plan, training_imgsz
from yolokd.precision import fit, name_of
from yolokd.probe import level_name
from yolokd.score import check_teacher

MAX_NORM = 10.0  # Ultralytics' own bound on the gradient norm
MOST_THREADS = 8  # Ultralytics' own bound on torch's threads on CPUs; it leaves one core idle besides


class DistillationTrainer(DetectionTrainer):
    """Ultralytics' detection trainer with a teacher.

    `overrides` takes yolokd's keys (`teacher`, `method`, `dfd.alpha`, …) beside those of `yolo train`.
    Raises UserError, before anything is written, for what cannot work.
    """

    args: Any

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> None:
        keys = {**overrides} if overrides else {}
        if "teacher" in keys:
            keys["teacher"] = as_paths(keys["teacher"], "teacher")
        self.plan: Plan = make_plan(_planned(cfg, keys))
        if keys.get("data") == "shapes" or (keys.get("data") is None and not keys.get("resume")):
            keys["data"] = data_file("shapes")
        own = self.plan.config.flat()
        with restricted_loading(self.plan.config.trust):
            super().__init__(cfg, {k: v for k, v in keys.items() if not is_own(k)}, _callbacks)
        vars(self.args).update(own)
        self.args.save_dir = str(self.save_dir)
        self.teacher_score: float | None = None  # mAP50-95 on the validation set, where it was measured
        self._clip: list[float] = []
        if RANK in {-1, 0} and not self.resume:
            self._save_repeatable(own | {"name": keys.get("name")})

    def _save_repeatable(self, own: dict[str, Any]) -> None:
        """Write distill.yaml, from which `yolokd train cfg=` repeats the run, under its original name."""
        given = YAML.load(self.save_dir / "args.yaml")
        run_only = {"save_dir", "resume", "mode", "task", "cfg"}
        YAML.save(self.save_dir / "distill.yaml", {k: v for k, v in given.items() if k not in run_only} | own)

    @property
    def criterion(self) -> DistillationCriterion | None:
        """Ours, or None for method=none."""
        found = unwrap_model(self.model)._modules.get("criterion")
        return found if isinstance(found, DistillationCriterion) else None

    def train(self) -> Any:
        """Run Ultralytics' loop, loading every checkpoint under restriction."""
        with restricted_loading(self.plan.config.trust), bfloat16_on_cpu():
            return super().train()

    # Building the pieces

    def set_model_attributes(self) -> None:
        """Attach the criterion, after `model.args` is set and before optimizer, DDP and EMA are built."""
        super().set_model_attributes()
        plan = self.plan
        if not plan.lessons:
            return
        self.model.yolokd = provenance(plan)
        use_all_cores(self.device)  # the precision is tried as the training will run
        images = sample_batch(self.data, training_imgsz(self.args.imgsz, plan)).to(self.device)
        precisions = self._precisions()
        self.plan = replace(  # the slow ones are not needed again
            plan, lessons=tuple(self._fast(*pair, images) for pair in zip(plan.lessons, precisions, strict=True))
        )
        lessons = [(lesson.teacher, lesson.pairing) for lesson in self.plan.lessons]
        criterion = DistillationCriterion(self.model, lessons, plan.config, self.args.seed)
        self.model.criterion = criterion.to(self.device)

    def _precisions(self) -> list[Any]:
        """Each teacher's; a resumed run goes on as it was."""
        state = load_sidecar(Path(str(self.args.model))) if self.resume else None
        if state is not None and state["device"] == self.device.type:
            return list(state["precisions"])
        return [self.plan.config.teacher_precision] * len(self.plan.lessons)

    def _fast(self, lesson: Lesson, precision: Any, images: Tensor) -> Lesson:
        config = self.plan.config
        teacher, notes = fit(
            lesson.teacher.to(self.device), images, precision, config.teacher_compile, config.teacher_imgsz
        )
        for note in notes if RANK in {-1, 0} else []:
            LOGGER.info(f"teacher {Path(lesson.file).name}: {note}")
        return replace(lesson, teacher=teacher)

    def _setup_train(self) -> None:
        asked = self.args.channels_last
        if self.device.type == "cpu":  # Ultralytics warns and ignores it there
            self.args.channels_last = None
        super()._setup_train()
        self.args.channels_last = asked
        if self.device.type == "cpu" and asked:
            self.model.to(memory_format=torch.channels_last)
            self.ema.ema.to(memory_format=torch.channels_last)
        self.ema.ema._modules.pop("criterion", None)
        if self.criterion is not None:
            self.criterion.set_length(self.epochs, len(self.train_loader))
        if RANK in {-1, 0} and self.plan.lessons:
            _announce(self.plan)
            if self.plan.config.check_teacher and not self.resume:
                self._score_teachers()
        # Scored: their memory is the training's now.
        self.plan = replace(self.plan, lessons=tuple(replace(lesson, model=None) for lesson in self.plan.lessons))
        use_all_cores(self.device)  # scoring the teacher has reset it

    def _score_teachers(self) -> None:
        args = self.args
        if RANK != -1:  # Ultralytics' validators gather over all ranks, and only one is here
            LOGGER.info("teacher: not scored in a run over several devices")
            return
        taken = ("data", "imgsz", "device", "workers", "split", "single_cls")
        settings = {key: getattr(args, key) for key in taken} | {"batch": self.batch_size * 2}
        scores = [
            check_teacher(lesson.model, self.data["names"], lesson.pairing.classes, settings, self.save_dir)
            for lesson in self.plan.lessons
        ]
        self.teacher_score = scores[-1]
        known = [score for score in scores if score is not None]
        if known != sorted(known):
            LOGGER.warning("teacher: the teachers' scores do not rise; give them weakest first")

    def get_validator(self) -> DetectionValidator:
        """Ultralytics' validator, which would reject yolokd's keys among its own."""
        with self._own_keys_hidden():
            return super().get_validator()

    @contextmanager
    def _own_keys_hidden(self) -> Iterator[None]:
        args = self.args
        self.args = copy(args)
        for key in [k for k in vars(args) if is_own(k)]:
            delattr(self.args, key)
        try:
            yield
        finally:
            self.args = args

    # The loop

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare the batch as Ultralytics does, and let the teacher begin on it."""
        batch = super().preprocess_batch(batch)
        if self.criterion is not None:
            self.criterion.start_teacher(batch["img"])
        return batch

    def optimizer_step(self) -> None:
        """Clip adapters apart from the student: in a joint norm, large adapter gradients shrink the student's step."""
        criterion = self.criterion
        if criterion is None:
            super().optimizer_step()
            return
        adapters = list(criterion.parameters())
        apart = {id(p) for p in adapters}
        student = [p for p in self.model.parameters() if id(p) not in apart]
        self.scaler.unscale_(self.optimizer)
        norm = clip_grad_norm_(student, max_norm=MAX_NORM)
        clip_grad_norm_(adapters, max_norm=MAX_NORM)
        if torch.isfinite(norm):
            self._clip.append(min(1.0, MAX_NORM / (float(norm) + 1e-6)))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)

    # Logs

    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train") -> Any:
        """Label loss items; validation has no distillation losses."""
        labels = super().label_loss_items(loss_items, prefix)
        if prefix == "train":
            return labels
        kept = [k for k in labels if k.removeprefix(f"{prefix}/") not in self._item_names()]
        return kept if isinstance(labels, list) else {k: labels[k] for k in kept}

    def _item_names(self) -> set[str]:
        return {f"{p.name}_{what}" for p in self.plan.config.parts for what in ("loss", "gain")}

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Add the measurements per level and the student's clip coefficient to results.csv, and log them."""
        criterion = self.criterion
        if criterion is not None:
            means = criterion.probe.means()
            clip = sum(self._clip) / len(self._clip) if self._clip else 1.0
            self._clip = []
            metrics = metrics | {f"level/{k}": v for k, v in means.items()} | {"clip/student": clip}
            LOGGER.info(_balance_line(self.plan, means, clip))
        super().save_metrics(metrics)

    # Checkpoints

    def save_model(self) -> bool:
        """Save Ultralytics' checkpoint, and the sidecar beside last.pt."""
        saved: bool = super().save_model()
        criterion = self.criterion
        if saved and criterion is not None:
            state = {"criterion": criterion.private_state(), "measured": criterion.probe.last}
            precisions = [name_of(lesson.teacher.engine.dtype) for lesson in self.plan.lessons]
            state |= {"precisions": precisions, "device": self.device.type}
            save_sidecar(self.last, {"epoch": self.epoch} | state)
        return saved

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume with our criterion out of the way: Ultralytics assigns its own on end-to-end heads."""
        model = unwrap_model(self.model)
        criterion = model._modules.pop("criterion", None)
        super().resume_training(ckpt)
        if criterion is None:
            return
        base = model.__dict__.pop("criterion", None)
        model.criterion = criterion
        if base is not None:
            criterion.base = base
        if self.resume:
            self._restore_sidecar(Path(str(self.args.model)), self.start_epoch - 1)

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Restore optimizer and EMA, which is rebuilt from the live model and must shed the criterion again."""
        super()._load_checkpoint_state(ckpt)
        self.ema.ema._modules.pop("criterion", None)
        if self.criterion is not None:  # NaN recovery; in a resume the criterion is put back, then restored
            self._restore_sidecar(self.last, ckpt["epoch"])
            self.criterion.probe.forget()
            self._clip = []

    def _restore_sidecar(self, checkpoint: Path, epoch: int) -> None:
        state = load_sidecar(checkpoint)
        if state is None or state["epoch"] != epoch:
            LOGGER.warning(f"{checkpoint} has no sidecar of its epoch: adapters start anew")
        elif self.criterion is not None:
            self.criterion.load_private_state(state["criterion"])
            self.criterion.probe.last = state["measured"]

    def final_eval(self) -> None:
        """Finish as Ultralytics does, and drop the sidecar: a finished run has nothing to resume."""
        if self.resume and self.best.exists():  # Ultralytics' stripping loads it without restriction
            load_model(self.best, "resume", self.plan.config.trust)
        super().final_eval()
        if RANK in {-1, 0}:
            sidecar_path(self.last).unlink(missing_ok=True)


def training_threads() -> int:
    """How many threads torch trains with on CPUs: one for each core that this process may use, up to Ultralytics' 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_THREADS, cores)


def use_all_cores(device: torch.device) -> None:
    """Give torch all `training_threads()` on CPUs; Ultralytics' device selection resets them."""
    # Measured on 2 cores: faster than a core kept free, also for a worker or a thread that prepares batches.
    if device.type == "cpu":
        torch.set_num_threads(training_threads())


@contextmanager
def bfloat16_on_cpu() -> Iterator[None]:
    """Within it, `amp=bf16` works on CPUs too, where Ultralytics' loop refuses it; other settings are as ever."""
    theirs = engine.autocast

    def autocast(enabled: bool | torch.dtype, device: str = "cuda") -> Any:
        if device == "cpu" and enabled is torch.bfloat16:
            return torch.autocast("cpu", torch.bfloat16)
        return theirs(enabled, device)

    engine.autocast = autocast
    try:
        yield
    finally:
        engine.autocast = theirs


def distillation_trainer(**keys: Any) -> Callable[..., DistillationTrainer]:
    """A trainer for Ultralytics' own extension point, `YOLO(...).train(trainer=...)`, with yolokd's keys bound.

    >>> from ultralytics import YOLO
    >>> trainer = distillation_trainer(teacher="yolov8l.pt", method="dfd")
    >>> YOLO("yolov8n.yaml").train(data="coco8.yaml", trainer=trainer)  # doctest: +SKIP
    """

    def build(
        cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> DistillationTrainer:
        return DistillationTrainer(cfg, {**(overrides or {}), **keys}, _callbacks)

    return build


def _planned(cfg: Any, keys: dict[str, Any]) -> dict[str, Any]:
    """The flat keys of the run to be: of the checkpoint, where one is resumed, under those given."""
    base = {k: v for k, v in (dict(cfg) if isinstance(cfg, dict) else {}).items() if k in KNOWN_KEYS}
    if not keys.get("resume"):
        return base | keys
    last = str(keys["resume"] if keys["resume"] is not True else keys.get("model"))
    _, ckpt = load_model(last, "resume", bool(keys.get("trust")))
    saved = {k: v for k, v in ckpt.get("train_args", {}).items() if k in KNOWN_KEYS or is_own(k)}
    if ckpt.get("epoch", -1) < 0 or ckpt.get("optimizer") is None:
        raise UserError(f"resume={last}", "is finished, nothing to resume", f"start a new run with student={last}")
    changed = [k for k, v in keys.items() if is_own(k) and k not in {"teacher", "trust"} and saved.get(k) != v]
    if changed:
        raise UserError(changed[0], "cannot change in a resumed run", "start a new run, or drop it")
    return base | saved | {k: v for k, v in keys.items() if v is not None} | {"model": last, "resume": last}


def _announce(plan: Plan) -> None:
    """Log what is paired with what."""
    for lesson in plan.lessons:
        name = f"distil from {Path(lesson.file).name}"
        for level in lesson.pairing.levels:
            LOGGER.info(
                f"{name}, {level_name(level.stride)}: student {level.student_channels} channels, "
                f"teacher {level.teacher_channels}"
            )
        classes = lesson.pairing.classes
        if classes.objectness:
            LOGGER.info(f"{name}, classes: none shared by name, the highest score of each model is one objectness")
        else:
            LOGGER.info(f"{name}, classes: {len(classes.student)} of {len(plan.data['names'])} shared by name")


def _balance_line(plan: Plan, means: dict[str, float], clip: float) -> str:
    """Ratios of distillation to task gradient, level by level, as one line of log."""
    names = [key.partition("/")[0] for key in means if key.endswith("/share")]
    ratios = (
        f"{part.name} " + " ".join(f"{n} {means[f'{n}/{part.name}_ratio']:.3g}" for n in names)
        for part in plan.config.parts
    )
    share = " ".join(f"{n} {means[f'{n}/share']:.2%}" for n in names)
    return (
        f"gradients, distillation/task: {'; '.join(ratios)}; teacher's confidence: {share}; student's clip {clip:.3g}"
    )


def provenance(plan: Plan) -> dict[str, Any]:
    """Where a student comes from, as plain data that travels in its checkpoint."""
    config = plan.config
    teachers = [{"file": Path(lesson.file).name, "sha256": lesson.sha256} for lesson in plan.lessons]
    return {
        "teacher": teachers[0] if len(teachers) == 1 else teachers,
        "method": config.method,
        "balance": config.balance,
        "gains": {p.name: p.gain for p in config.parts} if config.balance == "off" else {},
        "constants": {p.name: p.constants for p in config.parts},
        "versions": {
            "yolokd": yolokd.__version__,
            "ultralytics": ultralytics.__version__,
            "torch": str(torch.__version__),
        },
    }
