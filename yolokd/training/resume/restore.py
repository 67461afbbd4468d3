"""Put a trainer where an interrupted run stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ultralytics.utils import LOGGER

from yolokd.distillation.criterion import DistillationCriterion
from yolokd.models.detector import Detector
from yolokd.runtime.distributed import IS_DISTRIBUTED, IS_MAIN
from yolokd.runtime.files import remove_temporary_files
from yolokd.training.resume.saved_run import SavedRun
from yolokd.training.resume.sidecar import State, sidecar_error, sidecar_path
from yolokd.training.resume.state import check_state, optimizer_fits, restore_csv, restore_state


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


def restore_criterion(criterion: DistillationCriterion, state: State) -> None:
    """Restore adapters, confidence shares and gradient measurements."""
    criterion.load_private_state(state["criterion"])
    criterion.recorder.last = state["measured"]


def _bring_files(trainer: Any, saved_run: SavedRun) -> None:
    """Copy what a trained run left into the folder where it continues, if that is another one; repair its best.pt."""
    if saved_run.state is not None and not trainer.last.exists():
        trainer.last.write_bytes(saved_run.last.read_bytes())
        restore_csv(trainer, saved_run.state)
    if not saved_run.stripped or not trainer.best.exists():
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


def optimizer_matches(trainer: Any, checkpoint: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint's optimizer knows the same parameters: the same teachers, method and adapters."""
    plan, saved_run = trainer.plan, trainer.saved_run
    if saved_run is not None and not saved_run.has_teachers([paired.sha256 for paired in plan.teachers]):
        return False
    if saved_run is not None and saved_run.state and saved_run.state["own"].get("method") != plan.config.method:
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


def evaluate_trained_run(trainer: Any) -> None:
    """Make the final evaluation of a run that was interrupted after its last epoch."""
    LOGGER.info("resume: all epochs are done; only the final evaluation runs")
    if IS_DISTRIBUTED:
        trainer._setup_ddp()
    trainer.plan = replace(trainer.plan, teachers=())
    trainer._setup_train()
    trainer.epoch = trainer.saved_run.state["epoch"]
    if IS_MAIN:
        _bring_files(trainer, trainer.saved_run)
    trainer.final_eval()
    if IS_MAIN:
        remove_temporary_files(trainer.wdir)
        if trainer.args.plots:
            trainer.plot_metrics()
        trainer.run_callbacks("on_train_end")
