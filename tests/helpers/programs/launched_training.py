"""A training over two processes on CPUs: `launched_training.py SETTINGS-AS-JSON`, or the same under torchrun.

Environment variables:
LAUNCH=1: Ultralytics launches the two processes. BATCH=FILE: before the first step, each process writes the gradient
of its half of that batch into the run's folder. KILL=RANK:BATCH: this process kills itself after that batch, or, with
KILL=RANK:end, after its last epoch. STOP=RANK:BATCH: this process stops for good after that
batch. INTERRUPT=RANK:BATCH: this process alone gets Ctrl-C after that batch. NAN=RANK:BATCH: this process gets a loss
that is not finite.
DATA_OF_RANK_1=FILE: the second process reads this data set.
Each process writes its student's and its criterion's tensors into the run's folder at the end of each epoch, the
names of the unlabelled images in each batch, and the number of its batches when it stops.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.cli import status_of
from yolokd.training.tasks import make_trainer


def rank() -> int:
    """Return this process's rank, read each time: launched processes get the launcher's globals with its callbacks."""
    return int(os.environ.get("RANK", "-1"))


def halves_of(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the two halves of a batch."""
    middle = len(batch["img"]) // 2
    first = batch["batch_idx"] < middle
    halves = [{k: v[mask] for k, v in batch.items() if k != "img"} for mask in (first, ~first)]
    return [
        halves[0] | {"img": batch["img"][:middle]},
        halves[1] | {"img": batch["img"][middle:], "batch_idx": halves[1]["batch_idx"] - middle},
    ]


def gradients(trainer: Any, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Return the gradient of the sum of the batches' losses, with BatchNorm in eval mode.

    The trainer is unchanged afterwards.
    """
    model = trainer.model
    trainer.criterion.begin_epoch(0, trainer.epochs, len(trainer.train_loader))
    batch_norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    state = trainer.criterion.private_state()
    before = {k: v.clone() for k, v in state.items()}
    model.train()
    for module in batch_norms:
        module.eval()
    for batch in batches:
        loss, _ = model(batch)
        (loss.sum() * int(os.environ.get("WORLD_SIZE", "1"))).backward()
    result = {k: p.grad.clone() for k, p in unwrap_model(model).named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    trainer.criterion.load_private_state(before)
    for module in batch_norms:
        module.train()
    return result


def on_train_start(trainer: Any) -> None:
    halves = halves_of(torch.load(os.environ["BATCH"]))
    batches = halves if rank() == -1 else [halves[rank()]]
    torch.save(gradients(trainer, batches), Path(trainer.save_dir) / f"gradient-{rank()}.pt")


def note_unlabelled(trainer: Any) -> None:
    """Write down which unlabelled images each batch holds."""
    path = Path(trainer.save_dir) / f"unlabelled-{rank()}.txt"

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        batch = inputs[1]
        known = batch.get("labelled", ())
        files = [file for file, is_labelled in zip(batch.get("im_file", ()), known, strict=False) if not is_labelled]
        with open(path, "a") as f:
            f.writelines(f"{Path(file).name}\n" for file in files)

    trainer.criterion.register_forward_pre_hook(note)


def is_due(variable: str, moment: object) -> bool:
    """Return whether an environment variable is RANK:MOMENT for this process and this moment."""
    return os.environ.get(variable) == f"{rank()}:{moment}"


def on_train_batch_start(trainer: Any) -> None:
    trainer.batches = getattr(trainer, "batches", 0) + 1
    if is_due("NAN", trainer.batches):
        spoil = trainer.criterion.stage.methods[0].register_forward_hook(
            lambda _m, _i, losses: [loss * float("nan") for loss in losses]
        )
        trainer.spoil = spoil


def on_train_batch_end(trainer: Any) -> None:
    if hasattr(trainer, "spoil"):
        trainer.spoil.remove()
    if is_due("KILL", trainer.batches):
        os.kill(os.getpid(), signal.SIGKILL)
    if is_due("INTERRUPT", trainer.batches):
        os.kill(os.getpid(), signal.SIGINT)
    if is_due("STOP", trainer.batches):
        os.kill(os.getpid(), signal.SIGSTOP)


def on_fit_epoch_end(trainer: Any) -> None:
    if trainer.epoch + 1 == trainer.epochs and is_due("KILL", "end"):
        os.kill(os.getpid(), signal.SIGKILL)


def on_train_epoch_end(trainer: Any) -> None:
    tensors = trainer.criterion.private_state() | unwrap_model(trainer.model).state_dict()
    torch.save(tensors, Path(trainer.save_dir) / f"tensors-{rank()}.pt")
    with open(Path(trainer.save_dir) / f"pids-{rank()}.txt", "a") as f:
        f.write(f"{os.getpid()}\n")


def main() -> int:
    keys = json.loads(sys.argv[1])
    if rank() == 1:
        keys["data"] = os.environ.get("DATA_OF_RANK_1", keys["data"])
    trainer = make_trainer(keys)
    if "BATCH" in os.environ:
        trainer.add_callback("on_train_start", on_train_start)
    trainer.add_callback("on_pretrain_routine_end", note_unlabelled)
    for callback in (on_train_batch_start, on_train_batch_end, on_train_epoch_end, on_fit_epoch_end):
        trainer.add_callback(callback.__name__, callback)
    if os.environ.get("LAUNCH"):  # what Ultralytics sets for device=0,1, which needs GPUs
        trainer.ddp, trainer.world_size = True, 2
    try:
        trainer.train()
    finally:
        if rank() >= 0:
            (Path(trainer.save_dir) / f"batches-{rank()}.txt").write_text(str(trainer.batches))
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
