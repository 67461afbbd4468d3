"""The state of a trainer at the end of an epoch: captured, and restored in place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.config.parse import is_yolokd_key
from yolokd.runtime.distributed import IS_MAIN, WORLD_SIZE
from yolokd.runtime.files import atomic_path
from yolokd.runtime.rng import random_state, set_random_state
from yolokd.training.sidecar import State


def capture(trainer: Any) -> State:
    """A trainer at the end of an epoch: weights, averages, optimizer, unused gradients, scores."""
    model = unwrap_model(trainer.model)
    return {
        "model": model.state_dict(),
        "gradients": {k: p.grad for k, p in model.named_parameters() if p.grad is not None},
        "pending": trainer.pending,
        "own": {k: v for k, v in vars(trainer.args).items() if is_yolokd_key(k)},
        "ema": {"state": trainer.ema.ema.state_dict(), "updates": int(trainer.ema.updates)},
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "stopper": _plain(vars(trainer.stopper)),
        "stop": bool(trainer.stop),
        "best_fitness": _plain(trainer.best_fitness),
        "fitness": _plain(trainer.fitness),
        "metrics": _plain(trainer.metrics),
        "csv": trainer.csv.read_text(encoding="utf-8") if trainer.csv.exists() else "",
    }


def streams(loader: Any) -> State:
    """Random streams, the sampler's, and the mosaic's buffer: a process's own among several."""
    return {
        "random": random_state(),
        "sampler": loader.generator.get_state() if loader.generator is not None else None,
        "buffer": list(getattr(loader.dataset, "buffer", [])),
        "images": _images(loader),
    }


def _images(loader: Any) -> str:
    """A hash of the training images' names: the buffer and the sampler mean them by number."""
    return hashlib.sha256("\n".join(Path(f).name for f in loader.dataset.im_files).encode()).hexdigest()


def restore(trainer: Any, state: State) -> None:
    """Put weights, averages, optimizer, scores and results.csv back, in place."""
    unwrap_model(trainer.model).load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"]["state"])
    trainer.ema.updates = state["ema"]["updates"]
    for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups, strict=True):
        saved["fused"] = group.get("fused")  # the device's choice, not the checkpoint's
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # one that is off, as on CPUs, has no state
        trainer.scaler.load_state_dict(state["scaler"])
    vars(trainer.stopper).update({k: v for k, v in state["stopper"].items() if k != "patience"})  # which may change
    trainer.best_fitness, trainer.fitness = state["best_fitness"], state["fitness"]
    trainer.metrics = state["metrics"]
    if IS_MAIN and state["csv"]:  # rows that were written after the checkpoint are written again
        with atomic_path(trainer.csv) as temporary:
            temporary.write_text(state["csv"], encoding="utf-8")


def restore_streams(trainer: Any, state: State) -> None:
    """Put gradients, random streams and the mosaic's buffer back: the last thing before the first batch."""
    trainer.pending = state["pending"]
    for name, parameter in unwrap_model(trainer.model).named_parameters():
        if name in state["gradients"] and parameter.requires_grad:  # it may have been frozen since
            parameter.grad = state["gradients"][name].to(parameter.device)
    loader, saved = trainer.train_loader, state["streams"]
    if loader.num_workers:
        LOGGER.warning("resume: with workers=0 it would be exact; workers hold random streams that are lost")
    if len(saved) != WORLD_SIZE:
        LOGGER.warning(f"resume: not exact, {len(saved)} processes have become {WORLD_SIZE}")
        return
    own = saved[max(RANK, 0)]
    if own["images"] != _images(loader):
        LOGGER.warning("resume: not exact, the training images are others than the run began with")
        return
    for index in own["buffer"] if not loader.num_workers else []:
        loader.dataset.load_image(index)  # fills the buffer in its old order
    loader.iterator = loader._get_iterator()
    for _ in range(0 if loader.num_workers else len(loader)):
        loader.iterator._next_index()  # it ends an epoch with a draw that is made when the next one begins
    if own["sampler"] is not None:
        loader.generator.set_state(own["sampler"])
    set_random_state(own["random"])


def _plain(value: Any) -> Any:
    """NumPy's numbers as Python's, in a value or a dict of them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.item() if isinstance(value, np.generic | torch.Tensor) else value
