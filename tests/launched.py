"""A training over two processes on CPUs: `launched.py KEYS-AS-JSON`, alone (Ultralytics' own launch) or under torchrun.

Each process leaves in the run's folder the gradient of its half of a batch, before the first step, and what its
criterion holds at the end of each epoch. KILL=RANK:BATCH lets one of them kill itself, KILL=RANK:end when its last
epoch is done; NAN=RANK:BATCH gives one a loss that is not finite.
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
from yolokd.training.trainer import DistillationTrainer


def rank() -> int:
    """Asked anew each time: callbacks travel to the launched processes with the globals of the launching one."""
    return int(os.environ.get("RANK", "-1"))


def parts(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The two halves of a batch."""
    middle = len(batch["img"]) // 2
    first = batch["batch_idx"] < middle
    halves = [{k: v[mask] for k, v in batch.items() if k != "img"} for mask in (first, ~first)]
    return [
        halves[0] | {"img": batch["img"][:middle]},
        halves[1] | {"img": batch["img"][middle:], "batch_idx": halves[1]["batch_idx"] - middle},
    ]


def gradients(trainer: Any, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Of the sum of their losses, as the training loop takes it, with BatchNorm in eval mode; leaves no trace."""
    model = trainer.model
    trainer.criterion.begin_epoch(0, trainer.epochs, len(trainer.train_loader))
    normalizing = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    state = trainer.criterion.private_state()
    before = {k: v.clone() for k, v in state.items()}
    model.train()
    for module in normalizing:
        module.eval()
    for batch in batches:
        loss, _ = model(batch)
        (loss.sum() * int(os.environ.get("WORLD_SIZE", "1"))).backward()
    found = {k: p.grad.clone() for k, p in unwrap_model(model).named_parameters() if p.grad is not None}
    trainer.optimizer.zero_grad()
    trainer.criterion.load_private_state(before)
    for module in normalizing:
        module.train()
    return found


def on_train_start(trainer: Any) -> None:
    halves = parts(torch.load(os.environ["BATCH"]))
    own = halves if rank() == -1 else [halves[rank()]]
    torch.save(gradients(trainer, own), Path(trainer.save_dir) / f"gradient-{rank()}.pt")


def meant(order: str, now: object) -> bool:
    """Whether an environment variable RANK:MOMENT means this process and moment."""
    return os.environ.get(order) == f"{rank()}:{now}"


def on_train_batch_start(trainer: Any) -> None:
    trainer.batches = getattr(trainer, "batches", 0) + 1
    if meant("NAN", trainer.batches):
        spoil = trainer.criterion.stage.methods[0].register_forward_hook(
            lambda _m, _i, losses: [loss * float("nan") for loss in losses]
        )
        trainer.spoil = spoil


def on_train_batch_end(trainer: Any) -> None:
    if hasattr(trainer, "spoil"):
        trainer.spoil.remove()
    if meant("KILL", trainer.batches):
        os.kill(os.getpid(), signal.SIGKILL)


def on_fit_epoch_end(trainer: Any) -> None:
    if trainer.epoch + 1 == trainer.epochs and meant("KILL", "end"):
        os.kill(os.getpid(), signal.SIGKILL)


def on_train_epoch_end(trainer: Any) -> None:
    held = trainer.criterion.private_state() | unwrap_model(trainer.model).state_dict()
    torch.save(held, Path(trainer.save_dir) / f"held-{rank()}.pt")
    with open(Path(trainer.save_dir) / f"pids-{rank()}.txt", "a") as f:
        f.write(f"{os.getpid()}\n")


def main() -> int:
    trainer = DistillationTrainer(overrides=json.loads(sys.argv[1]))
    if "BATCH" in os.environ:
        trainer.add_callback("on_train_start", on_train_start)
    for callback in (on_train_batch_start, on_train_batch_end, on_train_epoch_end, on_fit_epoch_end):
        trainer.add_callback(callback.__name__, callback)
    if os.environ.get("LAUNCH"):  # as Ultralytics decides for device=0,1, which needs GPUs
        trainer.ddp, trainer.world_size = True, 2
    trainer.train()
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
