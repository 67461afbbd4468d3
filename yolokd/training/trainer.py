"""DistillationTrainer: Ultralytics' trainer with a teacher. Each override also calls Ultralytics' own."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer, DetectionValidator
from ultralytics.utils import DEFAULT_CFG
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.config.parse import split_keys
from yolokd.data.mixed import MixedDataset, mix_batches
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.models.checkpoint import load_model
from yolokd.patches.patched import Converted, patched
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.training_loop import adapters_left_out, atomic_stripping, bfloat16_on_cpu
from yolokd.pyramid.boxes import Labels
from yolokd.runtime import distributed
from yolokd.runtime.distributed import IS_DISTRIBUTED, IS_MAIN, WORLD_SIZE
from yolokd.runtime.files import AtomicPath, os_errors_as_user_errors
from yolokd.runtime.lock import FolderLock
from yolokd.runtime.signals import handle_signals
from yolokd.runtime.threads import use_all_cores
from yolokd.training import announce, logs, results
from yolokd.training.launch import SharedStopRequest, same_content_hash, stop_together, supervise_launch, worker_process
from yolokd.training.optimizer import OptimizerSteps, StepAfterEveryBatch
from yolokd.training.plan import TrainPlan, check_task
from yolokd.training.plan_run import device_of_run, plan_run, ultralytics_settings
from yolokd.training.resume import hint, restore, saved_run
from yolokd.training.resume.sidecar import State, drop_sidecars, load_sidecar, save_sidecar
from yolokd.training.resume.state import capture_state, capture_streams, restore_streams
from yolokd.training.settings import with_absolute_paths
from yolokd.training.teachers import attach_criterion, score_teachers


class DistillationTrainer(DetectionTrainer):
    """Ultralytics' detection trainer with a teacher; tasks.py puts the same overrides around those of other tasks.

    `overrides` takes yolokd's keys (`teacher`, `method`, `dfd.alpha`, …) beside those of `yolo train`.
    Raises UserError for what cannot work, before anything is written.
    """

    TASK = "detect"
    args: Any
    wdir: Path
    accumulate, tloss = Converted(lambda _, batches: StepAfterEveryBatch(batches)), Converted(logs.loss_means)

    def __init__(
        self, cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> None:
        keys = with_absolute_paths(overrides or {})
        self.saved_run = saved_run.load_saved_run(keys) if keys.get("resume") else None
        if IS_DISTRIBUTED:
            keys["device"] = distributed.init_process_group(device_of_run(keys, self.saved_run))
        self.plan: TrainPlan = plan_run(cfg, keys, self.saved_run)
        check_task(self.plan, self.TASK)
        self._lock = FolderLock()
        with self._lock.released_on_error():
            self._init_ultralytics(cfg, keys, _callbacks)
        self.wdir = AtomicPath(self.wdir)  # Ultralytics writes checkpoints in place; this path replaces them at once
        self.last, self.best = self.wdir / "last.pt", self.wdir / "best.pt"
        self.teacher_score: float | None = None  # mAP50-95 on the validation set; None if it was not measured
        self.steps = OptimizerSteps()
        self._state_to_restore: State | None = None
        self.adapters_changed = False  # whether a resumed run has other adapters than it began with
        self._resume_hint = partial(hint.resume_hint, self)
        self.stop_request = SharedStopRequest(self._resume_hint)
        self.last_before, self.finished = hint.stamp(self.last), False
        self._add_own_callbacks()
        if IS_MAIN:
            resumed = self.saved_run.folder if self.saved_run is not None else None
            logs.write_distill_yaml(self.save_dir, self.plan.config.flat() | {"name": keys.get("name")}, resumed)

    def _init_ultralytics(self, cfg: Any, keys: dict[str, Any], callbacks: dict[str, Any] | None) -> None:
        """Call Ultralytics' constructor without yolokd's keys, which it rejects, and put these into `args` after it."""
        settings = ultralytics_settings(keys, self.saved_run)
        with (
            safe_loading(self.plan.config.trust),
            os_errors_as_user_errors(lambda: "give a folder that can be written"),
        ):
            if not keys.get("resume"):
                settings["save_dir"] = distributed.shared_save_dir(get_cfg(cfg, settings))
            self._lock.take(settings["save_dir"])  # before Ultralytics writes into it
            super().__init__(cfg, settings, callbacks)
        if IS_DISTRIBUTED:
            self.world_size = WORLD_SIZE
            self.args.rect = False  # Ultralytics' own launch does so: rect gives processes unequal numbers of batches
        # A resumed checkpoint's arguments hold yolokd's keys, too: also those of a method that force=True has replaced.
        own = self.plan.config.flat() | {"save_dir": os.path.abspath(self.save_dir)}
        self.args = type(self.args)(**split_keys(vars(self.args)).ultralytics | own)

    def _add_own_callbacks(self) -> None:
        for event, callback in (
            ("on_train_batch_end", stop_together),
            ("on_train_start", DistillationTrainer._begin_training),
            ("on_train_epoch_start", DistillationTrainer._begin_epoch),
        ):
            if callback not in self.callbacks[event]:  # a launched process inherits those of the launching one
                self.add_callback(event, callback)

    @property
    def criterion(self) -> DistillationCriterion | None:
        """Return yolokd's criterion, or None for method=none."""
        module = unwrap_model(self.model)._modules.get("criterion")
        return module if isinstance(module, DistillationCriterion) else None

    def train(self) -> Any:
        """Run Ultralytics' loop, or its launch of several processes, with restricted loading of checkpoints."""
        if self.ddp:
            with self._lock:
                return supervise_launch(super().train, self._resume_hint)
        with (
            self._lock,
            safe_loading(self.plan.config.trust),
            bfloat16_on_cpu(),
            atomic_stripping(),
            adapters_left_out(),
            worker_process(self.device, self.stop_request, self._resume_hint) if IS_DISTRIBUTED else nullcontext(),
            handle_signals(self.stop_request),
            os_errors_as_user_errors(self._resume_hint),
        ):
            try:
                metrics = super().train()
            except RuntimeError:
                self.stop_request.raise_if_received()  # it may have killed a data worker, which raised this
                raise
            self.stop_request.raise_if_received()  # the signal may have come after the last step
            return metrics

    def _setup_ddp(self) -> None:
        """Take this process's device; the process group exists already."""
        self.device = distributed.device_of_rank(self.args.device)

    def _do_train(self) -> None:
        """Train, unless a resumed run lacks only its final evaluation."""
        if self.saved_run is not None and self.saved_run.trained:
            restore.evaluate_trained_run(self)
        else:
            super()._do_train()

    # Set-up
    def set_model_attributes(self) -> None:
        """Attach the criterion: after Ultralytics sets `model.args`, before it builds optimizer, DDP and EMA."""
        super().set_model_attributes()
        if self.plan.teachers:
            attach_criterion(self)

    def build_dataset(self, img_path: str, mode: str = "train", batch: int | None = None) -> Any:
        """Build Ultralytics' data set; that of the training gets the unlabelled images, too."""
        dataset = super().build_dataset(img_path, mode, batch)
        files, ratio = self.plan.unlabelled, self.plan.config.unlabelled_ratio
        return MixedDataset(dataset, files, self.args, ratio) if files and mode == "train" else dataset

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """Build Ultralytics' loader; its batches hold labelled images first, then unlabelled ones if there are any."""
        loader = super().get_dataloader(dataset_path, batch_size, rank, mode)
        if isinstance(loader.dataset, MixedDataset):
            mix_batches(loader)
        return loader

    def _setup_train(self) -> None:
        on_cpu = self.device.type == "cpu"
        with patched(self.args, "channels_last", None) if on_cpu else nullcontext():  # Ultralytics ignores it on CPUs
            super()._setup_train()
        for model in (self.model, self.ema.ema) if on_cpu and self.args.channels_last else ():
            model.to(memory_format=torch.channels_last)
        self.ema.ema._modules.pop("criterion", None)
        if IS_MAIN and self.plan.teachers:
            announce.announce_teachers(self)
            self._teacher_sizes = results.teacher_sizes(self)
            if self.plan.config.check_teacher and not self.resume:
                self.teacher_score = score_teachers(self.plan, self.args, self.device, self.batch_size, self.save_dir)
        # The whole teachers were needed for their scores only: free their memory.
        self.plan = replace(self.plan, teachers=tuple(replace(paired, model=None) for paired in self.plan.teachers))
        use_all_cores(self.device)  # scoring the teacher has reset the number of threads

    def get_validator(self) -> DetectionValidator:
        """Return Ultralytics' validator, built without yolokd's keys, which it would reject."""
        with patched(self, "args", type(self.args)(**split_keys(vars(self.args)).ultralytics)):
            return super().get_validator()

    # The loop
    def preprocess_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Prepare the batch as Ultralytics does, and start the teacher on it."""
        labels = Labels.from_centers(batch["batch_idx"], batch["bboxes"], *batch["img"].shape[-2:])  # still on the CPU
        batch = super().preprocess_batch(batch) | {"labels": labels}
        if self.criterion is not None:
            self.criterion.begin_step(batch["img"])
        return batch

    def _begin_training(self) -> None:
        results.keep_beginning(self)
        self.content_hash = same_content_hash(self.train_loader)
        self._state_to_restore = self.saved_run.state if self.saved_run is not None else None
        if self._state_to_restore is not None:
            self._close_mosaic = restore.close_mosaic_again(self)

    def _begin_epoch(self) -> None:
        if self.criterion is not None:
            self.criterion.begin_epoch(self.epoch, distributed.broadcast(self.epochs), len(self.train_loader))
            if not IS_MAIN:  # only the main process writes measurements
                self.steps.norms = []
                self.criterion.recorder.discard()
        state, self._state_to_restore = self._state_to_restore, None
        if state is not None:
            self.args.close_mosaic = self._close_mosaic
            restore_streams(self, state)

    def _clear_memory(self, threshold: float | None = None) -> None:
        """Clear memory as Ultralytics does, also after a step for which it did not suffice."""
        if self.criterion is not None:
            self.criterion.discard_step()
        super()._clear_memory(threshold)

    def _build_train_pipeline(self) -> None:
        """Build loaders as Ultralytics does, at the start and after such a step, whose gradients are dropped."""
        self.steps.pending = 0
        for stage in self.criterion.active if self.criterion is not None else ():
            stage.teacher.forget_graphs()
        super()._build_train_pipeline()

    def optimizer_step(self) -> None:
        """Count a batch; step the optimizer after `accumulate` of them, with adapters clipped apart."""
        if (criterion := self.criterion) is not None:
            criterion.guard.after_backward(int(self.accumulate))
        if self.steps.is_due(int(self.accumulate)):
            if criterion is None:
                super().optimizer_step()
            else:
                self.steps.step(self, list(criterion.parameters()), criterion.guard)

    # Logs
    def label_loss_items(self, loss_items: dict[str, Any] | None = None, prefix: str = "train") -> Any:
        """Return labelled loss items; leave out the distillation losses of a validation, which has none."""
        labels = super().label_loss_items(loss_items, prefix)
        return labels if prefix == "train" else logs.without_distillation(labels, prefix, self.plan)

    def save_metrics(self, metrics: dict[str, Any]) -> None:
        """Write a row of results.csv, with the measurements per level and the student's clip coefficient."""
        if self.criterion is not None:
            metrics = logs.add_measurements(self, metrics, sum(self._dropped_by_rank))
        logs.rotate_results_csv(self.csv, metrics, self.epoch)
        super().save_metrics(metrics)

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Recover as Ultralytics does; else gather what the main process is about to write from all processes."""
        recovered: bool = super()._handle_nan_recovery(epoch)
        dropped = self.criterion.guard.end_epoch() if self.criterion is not None else 0
        if not recovered:
            self._dropped_by_rank = distributed.all_gather(dropped)
            self._streams_by_rank = distributed.all_gather(capture_streams(self.train_loader))
        return recovered

    # Checkpoints
    def save_model(self) -> bool:
        """Save Ultralytics' checkpoint, and before it the sidecar that belongs to it."""
        save_sidecar(self.last, self.epoch, capture_state(self, self._streams_by_rank))
        saved: bool = super().save_model()
        drop_sidecars(self.last, but_epoch=self.epoch)
        return saved

    def resume_training(self, ckpt: dict[str, Any] | None) -> None:
        """Resume with yolokd's criterion set aside: Ultralytics assigns its own on end-to-end heads."""
        if self.saved_run is not None and self.saved_run.trained:
            return
        if self.resume and ckpt is not None:
            self.adapters_changed = restore.drop_unfit_optimizer(self, ckpt)
        with restore.criterion_set_aside(unwrap_model(self.model)):
            super().resume_training(ckpt)
        if self.resume:
            restore.restore_run(self)

    def _load_checkpoint_state(self, ckpt: dict[str, Any]) -> None:
        """Restore optimizer and EMA; the EMA is a copy of the student, and must not copy the criterion."""
        with restore.criterion_set_aside(unwrap_model(self.model)):
            super()._load_checkpoint_state(ckpt)
        if self.criterion is None:  # method=none, or a resume, which sets it aside and restores it later
            return
        state = load_sidecar(self.last, ckpt["epoch"])
        if state is not None:  # Ultralytics recovers from NaN
            restore.restore_criterion(self.criterion, state)
        self.criterion.recorder.discard()
        self.steps.restart(int(self.accumulate))

    def final_eval(self) -> None:
        """Finish as Ultralytics does, and write what a finished run leaves."""
        if self.resume and self.best.exists():  # Ultralytics would skip a broken one with a warning
            load_model(self.best, "resume", self.plan.config.trust)
        super().final_eval()
        if IS_MAIN:
            results.finish_run(self)
        self.finished = True
