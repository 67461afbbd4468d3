"""DistillationTrainer: builds the pieces and hands them to Ultralytics' training loop, of which it owns nothing."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.utils import DEFAULT_CFG, LOCAL_RANK, LOGGER, YAML
from ultralytics.utils.torch_utils import torch_distributed_zero_first, unwrap_model

from yolokd.config.parse import is_yolokd_key
from yolokd.config.ultralytics_keys import KNOWN_KEYS
from yolokd.data.dataset import check_images, data_file, sample_batch
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.errors import UserError, first_line
from yolokd.models.checkpoint import as_paths, load_model
from yolokd.models.evaluate import check_teacher
from yolokd.models.precision import choose_precision, name_of
from yolokd.patches.patched import patched
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.training_loop import adapters_not_counted, atomic_stripping, bfloat16_on_cpu
from yolokd.runtime import distributed
from yolokd.runtime.distributed import IS_DISTRIBUTED, IS_MAIN, WORLD_SIZE
from yolokd.runtime.files import AtomicPath, remove_temporary_files
from yolokd.runtime.signals import Interrupted, StopRequest, handle_signals
from yolokd.runtime.threads import use_all_cores
from yolokd.training.launch import supervise_launch, worker_process
from yolokd.training.logs import balance_summary, log_pairing
from yolokd.training.plan import PairedTeacher, TrainPlan, make_plan, training_imgsz
from yolokd.training.provenance import provenance
from yolokd.training.resume import Resumption, load_resumption
from yolokd.training.sidecar import State, drop_sidecars, load_sidecar, save_sidecar, sidecars
from yolokd.training.state import capture, restore, restore_streams, streams

MAX_NORM = 10.0  # Ultralytics' own bound on the gradient norm


class EveryBatch(int):
    """A number of batches that no count falls short of.

    Ultralytics' loop counts the batches since the last step in a variable of its own, which a resume would lose. So it
    is made to ask for a step after each, and the trainer counts.
    """

    def __le__(self, _count: int) -> bool:
        return True


class DistillationTrainer(DetectionTrainer):
    """Ultralytics' detection trainer with a teacher.

    `overrides` takes yolokd's keys (`teacher`, `method`, `dfd.alpha`, …) beside those of `yolo train`.
    Raises UserError, before anything is written, for what cannot work.
    """

    args: Any
    wdir: Path

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> None:
        keys = {**overrides} if overrides else {}
        if "teacher" in keys:
            keys["teacher"] = as_paths(keys["teacher"], "teacher")
        self._resumption = load_resumption(keys) if keys.get("resume") else None
        if IS_DISTRIBUTED:
            before = self._resumption.keys.get("device") if self._resumption is not None else None
            keys["device"] = distributed.init_process_group(before if keys.get("device") is None else keys["device"])
        with torch_distributed_zero_first(LOCAL_RANK):  # it may have to download, and is the one to complain
            self.plan: TrainPlan = make_plan(_planned(cfg, keys, self._resumption))
            if self._resumption is not None:
                _check_same(self.plan, self._resumption)
            check_images(self.plan.data, self.plan.args)
        if keys.get("data") == "shapes" or (keys.get("data") is None and not keys.get("resume")):
            keys["data"] = data_file("shapes")
        own = self.plan.config.flat()
        theirs = {k: v for k, v in keys.items() if not is_yolokd_key(k)}
        with safe_loading(self.plan.config.trust), _told(lambda: "give a folder that can be written"):
            if IS_DISTRIBUTED and not keys.get("resume"):
                theirs["save_dir"] = distributed.shared_save_dir(get_cfg(cfg, theirs))
            super().__init__(cfg, theirs, _callbacks)
        if IS_DISTRIBUTED:
            self.world_size = WORLD_SIZE
            self.args.rect = False  # as Ultralytics' own launch has it: it gives processes different numbers of batches
        vars(self.args).update(own)
        self.args.save_dir = str(self.save_dir)
        self.teacher_score: float | None = None  # mAP50-95 on the validation set, where it was measured
        self._clip: list[float] = []
        self.wdir = AtomicPath(self.wdir)  # checkpoints are then written whole or not at all
        self.last, self.best = self.wdir / "last.pt", self.wdir / "best.pt"
        self.pending = 0  # batches whose gradients wait for the optimizer
        self._streams: State | None = None
        self.adapters_changed = False  # whether a resumed run has other adapters than it began with
        self._request = StopRequest()
        self._begun, self._finished = time.time(), False
        for event, ours in (
            ("on_train_batch_end", DistillationTrainer._stop_if_asked),
            ("on_train_start", DistillationTrainer._close_mosaic_again),
            ("on_train_epoch_start", DistillationTrainer._begin_epoch),
        ):
            if ours not in self.callbacks[event]:  # a launched process is given those of the one that launched it
                self.add_callback(event, ours)
        if IS_MAIN and not self.resume:
            self.write_distill_yaml(own | {"name": keys.get("name")})

    def write_distill_yaml(self, own: dict[str, Any]) -> None:
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
        """Run Ultralytics' loop, or its launch of several processes, loading every checkpoint under restriction."""
        if self.ddp:
            return supervise_launch(super().train, self.resume_hint)
        with (
            safe_loading(self.plan.config.trust),
            bfloat16_on_cpu(),
            atomic_stripping(),
            adapters_not_counted(),
            worker_process(self.device, self._request, self.resume_hint) if IS_DISTRIBUTED else nullcontext(),
            handle_signals(self._request),
            _told(self.resume_hint),
        ):
            try:
                metrics = super().train()
            except RuntimeError:
                self._stop_if_asked()  # a data worker has died of the same signal
                raise
            self._stop_if_asked()  # a wish that came after the last step
            return metrics

    def _stop_if_asked(self) -> None:
        if self._request.signum is not None:
            raise Interrupted(self._request.signum, self.resume_hint())

    def resume_hint(self) -> str:
        """Return one sentence that tells the user how to continue this run."""
        if not self.resume and not (self.last.exists() and self.last.stat().st_mtime >= self._begun):
            return "there is no finished epoch to resume"
        if self._finished or (self.ddp and not sidecars(self.last)):
            return "the training is finished"
        return f"go on with: yolokd train resume={quote(str(self.save_dir))}"

    def _setup_ddp(self) -> None:
        """Take the device of this process, which has joined the others already."""
        self.device = distributed.device_of_rank(self.args.device)

    def _do_train(self) -> None:
        if self._resumption is None or not self._resumption.trained:
            super()._do_train()
            return
        assert self._resumption.state is not None
        LOGGER.info("resume: all epochs are done, the final evaluation is left")
        self.plan = replace(self.plan, teachers=())
        if IS_DISTRIBUTED:
            self._setup_ddp()
        self._setup_train()
        self.epoch = self._resumption.state["epoch"]
        self.final_eval()
        if IS_MAIN:
            remove_temporary_files(self.wdir)
            if self.args.plots:
                self.plot_metrics()
            self.run_callbacks("on_train_end")

    # Building the pieces

    def set_model_attributes(self) -> None:
        """Attach the criterion, after `model.args` is set and before optimizer, DDP and EMA are built."""
        super().set_model_attributes()
        plan = self.plan
        if not plan.teachers:
            return
        use_all_cores(self.device)  # the precision is tried as the training will run
        images = sample_batch(self.data, training_imgsz(self.args.imgsz, plan)).to(self.device)
        self.plan = replace(
            plan, teachers=self.optimize_teachers(plan.teachers, images)
        )  # the slow ones are not needed again
        self.model.yolokd = provenance(self.plan)
        teachers = [(paired.teacher, paired.pairing) for paired in self.plan.teachers]
        criterion = DistillationCriterion(self.model, teachers, plan.config, self.args.seed)
        self.model.criterion = criterion.to(self.device)

    def optimize_teachers(self, teachers: Sequence[PairedTeacher], images: Tensor) -> tuple[PairedTeacher, ...]:
        """Return the teachers at the precision that this run uses, the same in every process."""
        tried = [self._fast(*pair, images) for pair in zip(teachers, self._precisions(), strict=True)]
        agreed = distributed.broadcast([name_of(paired.teacher.settings.dtype) for paired in tried])  # timings differ
        return tuple(
            fast if name_of(fast.teacher.settings.dtype) == precision else self._fast(paired, precision, images)
            for paired, fast, precision in zip(teachers, tried, agreed, strict=True)
        )

    def _precisions(self) -> list[Any]:
        """Each teacher's; a resumed run goes on as it was."""
        state = self._state
        chosen = list(state["precisions"]) if state is not None and state["device"] == self.device.type else []
        count = len(self.plan.teachers)
        return chosen if len(chosen) == count else [self.plan.config.teacher_precision] * count

    def _fast(self, paired: PairedTeacher, precision: Any, images: Tensor) -> PairedTeacher:
        config = self.plan.config
        teacher, notes = choose_precision(
            paired.teacher.to(self.device), images, precision, config.teacher_compile, config.teacher_imgsz
        )
        for note in notes if IS_MAIN else []:
            LOGGER.info(f"teacher {Path(paired.file).name}: {note}")
        return replace(paired, teacher=teacher)

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
            self.criterion.guard.active = not self.scaler.is_enabled()
        if IS_MAIN and self.plan.teachers:
            log_pairing(self.plan)
            if self.plan.config.check_teacher and not self.resume:
                self._score_teachers()
        # Scored: their memory is the training's now.
        self.plan = replace(self.plan, teachers=tuple(replace(paired, model=None) for paired in self.plan.teachers))
        use_all_cores(self.device)  # scoring the teacher has reset it

    def _score_teachers(self) -> None:
        args = self.args
        if IS_DISTRIBUTED:  # Ultralytics' validators gather over all ranks, and only one is here
            LOGGER.info("teacher: not scored in a run over several devices")
            return
        taken = ("data", "imgsz", "device", "workers", "split", "single_cls")
        settings = {key: getattr(args, key) for key in taken} | {"batch": self.batch_size * 2}
        scores = [
            check_teacher(paired.model, self.data["names"], paired.pairing.classes, settings, self.save_dir)
            for paired in self.plan.teachers
        ]
        self.teacher_score = scores[-1]
        known = [score for score in scores if score is not None]
        if known != sorted(known):
            LOGGER.warning("teacher: the teachers' scores do not rise; give them weakest first")

    def get_validator(self) -> DetectionValidator:
        """Ultralytics' validator, which would reject yolokd's keys among its own."""
        theirs = type(self.args)(**{k: v for k, v in vars(self.args).items() if not is_yolokd_key(k)})
        with patched(self, "args", theirs):
            return super().get_validator()

    # The loop

    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare the batch as Ultralytics does, and let the teacher begin on it."""
        batch = super().preprocess_batch(batch)
        if self.criterion is not None:
            self.criterion.start_teacher(batch["img"])
        return batch

    @property
    def accumulate(self) -> int:
        """Batches between two steps of the optimizer, as Ultralytics sets it."""
        return self._accumulate

    @accumulate.setter
    def accumulate(self, batches: int) -> None:
        self._accumulate = EveryBatch(batches)

    def _begin_epoch(self) -> None:
        if self.criterion is not None:
            self.criterion.begin_epoch(self.epoch, self.epochs, len(self.train_loader))
            if not IS_MAIN:  # only the first process writes what was measured
                self._clip = []
                self.criterion.probe.forget()
        state, self._streams = self._streams, None
        if state is not None:
            self.args.close_mosaic = state["close_mosaic"]
            restore_streams(self, state)

    def _close_mosaic_again(self) -> None:
        """A run that had closed its mosaic goes on without: the loop would close it anew, and shuffle once more."""
        self._streams = state = self._state
        if state is None:
            return
        state["close_mosaic"] = closing = self.args.close_mosaic
        if closing and self.start_epoch > self.epochs - closing:
            self._close_dataloader_mosaic()
            self.train_loader.reset()
            self.args.close_mosaic = 0

    @property
    def _state(self) -> State | None:
        return self._resumption.state if self._resumption is not None else None

    def optimizer_step(self) -> None:
        """Step once enough batches are in."""
        if self.criterion is not None:
            self.criterion.guard.after_backward(list(self.criterion.parameters()))
        self.pending += 1
        if self.pending >= int(self.accumulate):
            self.pending = 0
            self._step()

    def _step(self) -> None:
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
        return {f"{p.name}_{what}" for p in self.plan.config.method_configs for what in ("loss", "gain")}

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Add the measurements per level and the student's clip coefficient to results.csv, and log them."""
        criterion = self.criterion
        if criterion is not None:
            means = criterion.probe.means()
            clip = sum(self._clip) / len(self._clip) if self._clip else 1.0
            self._clip = []
            metrics = metrics | {f"level/{k}": v for k, v in means.items()} | {"clip/student": clip}
            metrics["distill/dropped"] = sum(self._dropped)
            LOGGER.info(balance_summary(self.plan, means, clip))
        self.rotate_results_csv(metrics)
        super().save_metrics(metrics)

    def rotate_results_csv(self, metrics: dict[str, Any]) -> None:
        """Put a table of other columns aside, as of another method before a resume: Ultralytics would go on in it."""
        if not self.csv.exists():
            return
        with open(self.csv, encoding="utf-8") as f:
            columns = f.readline().strip().split(",")
        if columns != ["epoch", "time", *metrics]:
            self.csv.rename(self.csv.with_stem(f"results-to-{self.epoch}"))

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Ultralytics' recovery; all processes pass here before the first alone writes, and tell it what it needs."""
        recovered: bool = super()._handle_nan_recovery(epoch)
        if not recovered:
            self._dropped = distributed.all_gather(
                self.criterion.guard.end_epoch() if self.criterion is not None else 0
            )
            self._everyones_streams = distributed.all_gather(streams(self.train_loader))
        return recovered

    # Checkpoints

    def save_model(self) -> bool:
        """Save Ultralytics' checkpoint, and before it the sidecar that belongs to it."""
        state = capture(self) | {
            "streams": self._everyones_streams,
            "epoch": self.epoch,
            "device": self.device.type,
            "names": dict(self.data["names"]),
        }
        state["precisions"] = [name_of(paired.teacher.settings.dtype) for paired in self.plan.teachers]
        state["teachers"] = [paired.sha256 for paired in self.plan.teachers]
        if self.criterion is not None:
            state |= {"criterion": self.criterion.private_state(), "measured": self.criterion.probe.last}
        save_sidecar(self.last, self.epoch, state)
        saved: bool = super().save_model()
        drop_sidecars(self.last, but_epoch=self.epoch)
        return saved

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume with our criterion out of the way: Ultralytics assigns its own on end-to-end heads."""
        if self._resumption is not None and self._resumption.trained:
            return
        model = unwrap_model(self.model)
        criterion = model._modules.pop("criterion", None)
        self.adapters_changed = ckpt is not None and bool(self.resume) and not self.optimizer_matches(ckpt)
        if ckpt is not None and self.adapters_changed:
            LOGGER.warning("resume: adapters are not those of the checkpoint: they and the optimizer start anew")
            ckpt["optimizer"] = None
        super().resume_training(ckpt)
        if criterion is not None:
            base = model.__dict__.pop("criterion", None)
            model.criterion = criterion
            if base is not None:
                criterion.base = base
        if self.resume:
            self._restore()

    def optimizer_matches(self, ckpt: dict[str, Any]) -> bool:
        """Whether teacher and method, and so the parameters, are those that a checkpoint's optimizer knows."""
        state = self._state
        if state is not None and state["teachers"] != [paired.sha256 for paired in self.plan.teachers]:
            return False
        if state is not None and state["own"].get("method") != self.plan.config.method:
            return False
        saved = [len(group["params"]) for group in (ckpt.get("optimizer") or {}).get("param_groups", [])]
        return saved == [len(group["params"]) for group in self.optimizer.param_groups]

    def _restore(self) -> None:
        assert self._resumption is not None
        last, state = self._resumption.last, self._state
        if IS_MAIN:
            remove_temporary_files(self.wdir)
            remove_temporary_files(self.save_dir)
        if state is None:
            LOGGER.warning(
                f"resume: {last} has no sidecar of its epoch. Weights go on from a float16 average, the optimizer from "
                "float16; random streams, adapters and gradients' means start anew: no exact continuation"
            )
            return
        if self.adapters_changed:
            state |= {"optimizer": self.optimizer.state_dict(), "gradients": {}}
        restore(self, state)
        if not self.adapters_changed:
            self._restore_criterion(state)
        if IS_MAIN and state["fitness"] == state["best_fitness"] and last.exists():
            self.best.write_bytes(last.read_bytes())  # a cut between the two had left an older one

    def _restore_criterion(self, state: State) -> None:
        if self.criterion is not None:
            self.criterion.load_private_state(state["criterion"])
            self.criterion.probe.last = state["measured"]

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Restore optimizer and EMA, which is rebuilt from the live model and must shed the criterion again."""
        super()._load_checkpoint_state(ckpt)
        self.ema.ema._modules.pop("criterion", None)
        if self.criterion is None:  # none, or in a resume, which puts it back and restores it
            return
        state = load_sidecar(self.last, ckpt["epoch"])
        if state is not None:  # recovery from NaN
            self._restore_criterion(state)
        self.criterion.probe.forget()
        self._clip = []
        self.pending = int(self.accumulate)  # the loop, too, steps at once

    def final_eval(self) -> None:
        """Finish as Ultralytics does, and drop the sidecar: a finished run has nothing to resume."""
        if self.resume and self.best.exists():  # Ultralytics' stripping loads it without restriction
            load_model(self.best, "resume", self.plan.config.trust)
        super().final_eval()
        if IS_MAIN:
            drop_sidecars(self.last)
        self._finished = True


@contextmanager
def _told(cure: Callable[[], str]) -> Iterator[None]:
    """Within it, what the system refuses is told as an error of the user's: folders, a full disk, a vanished image."""
    try:
        yield
    except OSError as e:
        image = "Image Not Found" in str(e)
        if not (image or e.filename or e.errno == errno.ENOSPC):  # a network's, say
            raise
        what = first_line(e) if image else f"{e.strerror}: {e.filename}" if e.filename else str(e.strerror)
        raise UserError("files", what, cure()) from e


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


def _planned(cfg: Any, keys: dict[str, Any], resumed: Resumption | None) -> dict[str, Any]:
    """The flat keys of the run to be: of the checkpoint, where one is resumed, under those given."""
    base = {k: v for k, v in (dict(cfg) if isinstance(cfg, dict) else {}).items() if k in KNOWN_KEYS}
    if resumed is None:
        return base | keys
    saved = {k: v for k, v in resumed.keys.items() if k in KNOWN_KEYS or is_yolokd_key(k)}
    last = str(resumed.last)
    return base | saved | {k: v for k, v in keys.items() if v is not None} | {"model": last, "resume": last}


def _check_same(plan: TrainPlan, resumed: Resumption) -> None:
    """Refuse to go on with another teacher or other classes than a run began with."""
    state = resumed.state
    if state is None or plan.config.force:
        return
    if state["teachers"] != [paired.sha256 for paired in plan.teachers]:
        raise UserError("teacher", "is another than the run began with", "give that one, or force=True")
    if state["names"] != dict(plan.data["names"]):
        raise UserError("data", "has other classes than the run began with", "give that set, or force=True")
