"""Exact resumes: all that a training is at the end of an epoch, beside last.pt, and back again.

Ultralytics' own checkpoint holds a float16 average of the weights and of the optimizer's state, and no random stream.
The sidecar holds the rest in full precision, as tensors and plain data that load without running code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolokd import __version__
from yolokd.checkpoint import load_model
from yolokd.config import is_own, method_names
from yolokd.errors import UserError
from yolokd.files import atomic_path
from yolokd.ranks import FIRST, PROCESSES
from yolokd.rng import random_state, set_random_state

State = dict[str, Any]
FORMAT = 1  # of sidecars: to be raised where older ones no longer serve


def sidecar_path(checkpoint: Path, epoch: int) -> Path:
    """Where the sidecar of `last.pt` lies at an epoch, from 0: beside it, under no name that Ultralytics looks for.

    Each epoch has a name of its own: the new one is there before last.pt is replaced, the old one until after.
    """
    return checkpoint.with_name(f"distill-{checkpoint.stem}-{epoch}.pt")


def sidecars(checkpoint: Path) -> list[Path]:
    """All sidecars beside `checkpoint`: one, or two while it is being replaced."""
    found = checkpoint.parent.glob(f"distill-{checkpoint.stem}-*.pt")
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def save_sidecar(checkpoint: Path, epoch: int, state: State) -> None:
    """Write a state beside `checkpoint`, atomically."""
    with atomic_path(sidecar_path(checkpoint, epoch)) as temporary:
        torch.save({"format": FORMAT, "yolokd": __version__} | state, temporary)


def load_sidecar(checkpoint: Path, epoch: int) -> State | None:
    """Read the sidecar of an epoch, or None where there is none; never runs code from it.

    epoch: -1, as a finished checkpoint says, for the only one that is there.
    Raises UserError where it cannot be read, or another yolokd wrote it in another format.
    """
    found = sidecars(checkpoint) if epoch < 0 else [sidecar_path(checkpoint, epoch)]
    if not found or not found[-1].is_file():
        return None
    try:
        state: State = torch.load(found[-1], map_location="cpu", weights_only=True)
        written = state.get("format")
    except Exception as e:
        raise UserError(f"resume={checkpoint}", f"its sidecar {found[-1].name} is unreadable", "start a new run") from e
    if written != FORMAT:
        why = f"its sidecar {found[-1].name} has the format of yolokd {state.get('yolokd', 'before 0.1.0')}"
        raise UserError(f"resume={checkpoint}", why, "resume with that version, or start a new run")
    return state


def drop_sidecars(checkpoint: Path, but_epoch: int | None = None) -> None:
    """Remove the sidecars, but for that of one epoch."""
    kept = None if but_epoch is None else sidecar_path(checkpoint, but_epoch)
    for path in sidecars(checkpoint):
        if path != kept:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Resumption:
    """A run to go on with: its checkpoint, the keys that it was started with, and its sidecar, where there is one."""

    last: Path
    keys: dict[str, Any]
    state: State | None

    @property
    def trained(self) -> bool:
        """Whether all its epochs are done, and the final evaluation alone is left."""
        return self.state is not None and bool(self.state["stop"])


def resumption(keys: Mapping[str, Any]) -> Resumption:
    """What `resume=` goes on with.

    Raises UserError where there is nothing to resume, and for settings that cannot change on the way.
    """
    last = Path(str(keys["resume"] if keys["resume"] is not True else keys.get("model")))
    _, checkpoint = load_model(last, "resume", bool(keys.get("trust")))
    state = load_sidecar(last, int(checkpoint.get("epoch", -1)))
    finished = checkpoint.get("epoch", -1) < 0 or checkpoint.get("optimizer") is None
    if finished and (state is None or not state["stop"]):
        raise UserError(f"resume={last}", "is finished, nothing to resume", f"start a new run with student={last}")
    saved = dict(checkpoint.get("train_args", {})) | (state["own"] if state is not None else {})
    if not any(map(is_own, saved)):
        saved |= {} if keys.get("teacher") else {"method": "none"}  # a run of plain Ultralytics, unless told otherwise
    elif keys.get("teacher") and not keys.get("method") and saved.get("method") == "none":
        raise UserError("teacher", "would not teach: the run has method=none", "drop it, or give method= and force=")
    elif keys.get("force"):
        names = method_names(keys.get("method") or saved["method"])
        saved = {k: v for k, v in saved.items() if "." not in k or k.partition(".")[0] in names}
    else:
        _check_unchanged(keys, saved)
    return Resumption(last, saved, state)


def _check_unchanged(keys: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if is_own(key) and key not in {"teacher", "trust", "force"} and saved.get(key) != value:
            raise UserError(key, "cannot change in a resumed run", "start a new run, drop it, or give force=True")


def capture(trainer: Any) -> State:
    """A trainer at the end of an epoch: weights, averages, optimizer, unused gradients, scores."""
    model = unwrap_model(trainer.model)
    return {
        "model": model.state_dict(),
        "gradients": {k: p.grad for k, p in model.named_parameters() if p.grad is not None},
        "pending": trainer.pending,
        "own": {k: v for k, v in vars(trainer.args).items() if is_own(k)},
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
    if FIRST and state["csv"]:  # rows that were written after the checkpoint are written again
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
    if len(saved) != PROCESSES:
        LOGGER.warning(f"resume: not exact, {len(saved)} processes have become {PROCESSES}")
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
