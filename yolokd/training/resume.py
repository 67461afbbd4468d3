"""How an interrupted run continues: which keys it takes, what is refused, and what is restored.

Ultralytics' checkpoint holds a float16 average of the weights and of the optimizer's state, and no random state. The
sidecar beside it (sidecar.py) holds the rest in full precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from ultralytics.utils import LOCAL_RANK, LOGGER
from ultralytics.utils.torch_utils import torch_distributed_zero_first

from yolokd.config.arguments import as_list
from yolokd.config.parse import method_names, split_keys, without_trust
from yolokd.config.ultralytics_keys import KNOWN_KEYS
from yolokd.data.dataset import data_file
from yolokd.data.shape_labels import KINDS
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model
from yolokd.models.detector import Detector
from yolokd.runtime.distributed import IS_DISTRIBUTED, IS_MAIN
from yolokd.runtime.files import remove_temporary_files
from yolokd.training.plan import TrainPlan, check_data, make_plan, with_unlabelled_images
from yolokd.training.sidecar import State, load_sidecar, sidecar_error, sidecar_path, sidecars
from yolokd.training.state import check_state, optimizer_fits, restore_state

# yolokd's keys that a resumed run may be given anew; the content of files is compared later.
CHANGEABLE = frozenset({"teacher", "unlabelled", "report", "trust", "force"})


@dataclass(frozen=True)
class SavedRun:
    """An interrupted run: its last.pt, the keys that it was started with, and its sidecar's content if there is one."""

    last: Path
    keys: dict[str, Any]
    state: State | None
    stripped: bool  # whether last.pt is in its final form already

    @property
    def folder(self) -> Path:
        """Return the run's folder: where its checkpoint lies now, whatever path is written inside the checkpoint."""
        return self.last.parent.parent if self.last.parent.name == "weights" else self.last.parent

    @property
    def trained(self) -> bool:
        """Return whether all its epochs are done, so that only the final evaluation remains."""
        return self.state is not None and bool(self.state["stop"])


def load_saved_run(keys: Mapping[str, Any]) -> SavedRun:
    """Load the run that `resume=` names.

    Raises UserError if there is nothing to resume, and for a key that cannot change in a resumed run.
    """
    last = Path(str(keys["resume"] if keys["resume"] is not True else keys.get("model")))
    model, checkpoint = load_model(last, "resume", bool(keys.get("trust")))
    epoch = int(checkpoint.get("epoch", -1))
    state = load_sidecar(last, epoch)
    if state is not None and epoch >= 0 and not _is_of_checkpoint(state, model):
        LOGGER.warning(f"resume: the sidecar beside {last} belongs to another run, and is ignored")
        state = None
    finished = epoch < 0 or checkpoint.get("optimizer") is None
    if finished and (state is None or not state["stop"]):
        raise UserError(f"resume={last}", "is finished, nothing to resume", f"start a new run with student={last}")
    saved = dict(checkpoint.get("train_args", {})) | (state["own"] if state is not None else {})
    saved = without_trust(saved, f"resume={last}")
    if not split_keys(saved).distillation:
        saved |= {} if keys.get("teacher") else {"method": "none"}  # a run of plain Ultralytics, unless told otherwise
    elif keys.get("teacher") and not keys.get("method") and saved.get("method") == "none":
        raise UserError(
            "teacher", "would not teach: the run has method=none", "drop it, or give method= and force=True"
        )
    elif keys.get("force"):
        names = method_names(keys.get("method") or saved["method"])
        saved = {k: v for k, v in saved.items() if "." not in k or k.partition(".")[0] in names}
    else:
        _check_unchanged(keys, saved)
    return SavedRun(last, saved, state, finished)


def _is_of_checkpoint(state: State, model: Detector) -> bool:
    """Return whether a sidecar's averaged weights are those of a checkpoint, which holds them in half precision."""
    averaged, weights = state["ema"]["state"], model.state_dict()
    return averaged.keys() == weights.keys() and all(
        torch.equal(averaged[key].half().nan_to_num(), weights[key].half().nan_to_num()) for key in weights
    )


def _check_unchanged(keys: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in split_keys(keys).distillation.items():
        is_new = key == "unlabelled" and (value is None) != (saved.get(key) is None)
        if is_new or (key not in CHANGEABLE and as_list(saved.get(key)) != as_list(value)):
            raise UserError(key, "cannot change in a resumed run", "start a new run, drop it, or give force=True")


def merge_keys(cfg: Any, keys: Mapping[str, Any], saved_run: SavedRun | None) -> dict[str, Any]:
    """Return the flat keys of the run: those given, over a resumed checkpoint's, over those of Ultralytics' `cfg`."""
    base = {k: v for k, v in (dict(cfg) if isinstance(cfg, dict) else {}).items() if k in KNOWN_KEYS}
    if saved_run is None:
        return base | dict(keys)
    saved = split_keys(saved_run.keys)
    saved_settings = {k: v for k, v in saved.ultralytics.items() if k in KNOWN_KEYS}
    given = {"save_dir": str(saved_run.folder)} | {k: v for k, v in keys.items() if v is not None}
    last = str(saved_run.last)
    return base | saved_settings | saved.distillation | given | {"model": last, "resume": last}


def ultralytics_settings(keys: Mapping[str, Any], saved_run: SavedRun | None) -> dict[str, Any]:
    """Return the settings that Ultralytics' constructor gets: those given, with paths for a data set and a resumed run.

    A resumed run writes where its checkpoint lies, not into the folder that is written inside the checkpoint.
    """
    settings = split_keys(keys).ultralytics
    if saved_run is not None:
        settings.setdefault("save_dir", str(saved_run.folder))
    if settings.get("data") in KINDS or (settings.get("data") is None and saved_run is None):
        settings["data"] = data_file(settings.get("data"))
    return settings


def device_of_run(keys: Mapping[str, Any], saved_run: SavedRun | None) -> object:
    """Return the `device` that is given, or else the one that a resumed run began with."""
    device = keys.get("device")
    return saved_run.keys.get("device") if device is None and saved_run is not None else device


def plan_run(cfg: Any, keys: Mapping[str, Any], saved_run: SavedRun | None) -> TrainPlan:
    """Plan and check a run in every process; the first one goes ahead, since it may have to download.

    Raises UserError for what cannot work, and for a resumed run that would be another one.
    """
    with torch_distributed_zero_first(LOCAL_RANK):
        plan = make_plan(merge_keys(cfg, keys, saved_run))
        if saved_run is not None:
            check_same_run(plan, saved_run)
        check_data(plan)
        return with_unlabelled_images(plan)


def check_same_run(plan: TrainPlan, saved_run: SavedRun) -> None:
    """Raise UserError if a resumed run has another teacher or other classes than it began with, unless force=True."""
    state = saved_run.state
    if state is None or plan.config.force:
        return
    if state["teachers"] != [paired.sha256 for paired in plan.teachers]:
        raise UserError("teacher", "is another than the run began with", "give that one, or force=True")
    if state["names"] != dict(plan.data["names"]):
        raise UserError("data", "has other classes than the run began with", "give that set, or force=True")


def teacher_precisions(saved_run: SavedRun | None, plan: TrainPlan, device: torch.device) -> list[Any]:
    """Return a precision for each teacher: what the run began with if it resumes on the same kind of device."""
    state = saved_run.state if saved_run is not None else None
    saved = list(state["precisions"]) if state is not None and state["device"] == device.type else []
    count = len(plan.teachers)
    return saved if len(saved) == count else [plan.config.teacher_precision] * count


def optimizer_matches(trainer: Any, checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint's optimizer knows the same parameters: the same teachers, method and adapters."""
    plan, state = trainer.plan, trainer.saved_run.state if trainer.saved_run is not None else None
    if state is not None and state["teachers"] != [paired.sha256 for paired in plan.teachers]:
        return False
    if state is not None and state["own"].get("method") != plan.config.method:
        return False
    return optimizer_fits(checkpoint.get("optimizer"), trainer.optimizer)


def drop_unfit_optimizer(trainer: Any, checkpoint: dict[str, Any]) -> bool:
    """Remove the optimizer from a checkpoint that has other adapters than the run; return whether it has."""
    if optimizer_matches(trainer, checkpoint):
        return False
    LOGGER.warning("resume: the checkpoint has other adapters: adapters and optimizer start anew")
    checkpoint["optimizer"] = None
    return True


@contextmanager
def criterion_set_aside(student: Detector) -> Iterator[None]:
    """Take yolokd's criterion off the student inside the block, and give it the base criterion that is built there.

    On end-to-end heads Ultralytics assigns its own criterion in a resume, which a submodule of that name forbids.
    """
    criterion = student._modules.pop("criterion", None)
    yield
    if criterion is not None:
        base = student.__dict__.pop("criterion", None)
        student.criterion = criterion
        if base is not None:
            criterion.base = base


def evaluate_trained_run(trainer: Any) -> None:
    """Make the final evaluation of a run that was interrupted after its last epoch."""
    LOGGER.info("resume: all epochs are done; only the final evaluation runs")
    if IS_DISTRIBUTED:
        trainer._setup_ddp()
    trainer.plan = replace(trainer.plan, teachers=())
    trainer._setup_train()
    trainer.epoch = trainer.saved_run.state["epoch"]
    if IS_MAIN and not trainer.saved_run.stripped:
        _repair_best(trainer, trainer.saved_run)
    trainer.final_eval()
    if IS_MAIN:
        remove_temporary_files(trainer.wdir)
        if trainer.args.plots:
            trainer.plot_metrics()
        trainer.run_callbacks("on_train_end")


def restore_run(trainer: Any) -> None:
    """Put the trainer where the sidecar says; warn if there is none, since the run then continues inexactly.

    Raises UserError, before it changes anything, if the sidecar does not fit.
    """
    saved_run: SavedRun = trainer.saved_run
    last, state = saved_run.last, saved_run.state
    if IS_MAIN:
        remove_temporary_files(trainer.wdir)
        remove_temporary_files(trainer.save_dir)
    if state is None:
        LOGGER.warning(
            f"resume: {last} has no sidecar of its epoch, so the run does not continue exactly: weights and optimizer "
            "come from float16; random state, adapters and gradient measurements start anew"
        )
        return
    if trainer.adapters_changed:
        state |= {"optimizer": trainer.optimizer.state_dict(), "gradients": {}}
    try:
        check_state(trainer, state)
    except ValueError as e:
        raise sidecar_error(last, sidecar_path(last, state["epoch"]).name, str(e)) from e
    restore_state(trainer, state)
    if not trainer.adapters_changed and trainer.criterion is not None:
        restore_criterion(trainer.criterion, state)
    if IS_MAIN:
        _repair_best(trainer, saved_run)


def _repair_best(trainer: Any, saved_run: SavedRun) -> None:
    """Write best.pt anew if it is older than last.pt or lies in another folder.

    A run may have been cut after it wrote last.pt and before best.pt; and it may go on in another folder.
    """
    last, state = saved_run.last, saved_run.state
    best = last.with_name("best.pt")
    if state is not None and state["fitness"] == state["best_fitness"]:
        trainer.best.write_bytes(last.read_bytes())
    elif best.exists() and not trainer.best.exists():
        trainer.best.write_bytes(best.read_bytes())


def restore_criterion(criterion: DistillationCriterion, state: State) -> None:
    """Restore adapters, confidence shares and gradient measurements."""
    criterion.load_private_state(state["criterion"])
    criterion.recorder.last = state["measured"]


def close_mosaic_again(trainer: Any) -> int:
    """Close the mosaic now if the run had closed it; return the setting `close_mosaic`, for the first epoch.

    Ultralytics' loop would close it after the random state is restored, and shuffle anew. Until then the setting is 0.
    """
    last_epochs: int = trainer.args.close_mosaic
    if last_epochs and trainer.start_epoch > trainer.epochs - last_epochs:
        trainer._close_dataloader_mosaic()
        trainer.train_loader.reset()
        trainer.args.close_mosaic = 0
    return last_epochs


def stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced, whatever the clock says; None if there is no file."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def resume_hint(trainer: Any) -> str:
    """Return one sentence that tells the user how to continue an interrupted run."""
    last: Path = trainer.last
    if not trainer.resume and stamp(last) == trainer.last_before:
        return "there is no finished epoch to resume"
    if trainer.finished or (trainer.ddp and not sidecars(last)):
        return "the training is finished"
    return f"go on with: yolokd train resume={quote(str(Path(trainer.save_dir).absolute()))}"
