"""The state of a trainer at the end of an epoch: capture it, and restore it in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.config.parse import split_keys
from yolokd.data.fingerprint import image_names_hash
from yolokd.data.mixed import MixedDataset
from yolokd.models.teachers.precision import name_of
from yolokd.runtime.distributed import IS_MAIN, WORLD_SIZE
from yolokd.runtime.files import atomic_path
from yolokd.runtime.rng import random_state, set_random_state
from yolokd.training.resume.sidecar import State


def capture_state(trainer: Any, streams_by_rank: Sequence[State]) -> State:
    """Return all that a resume needs of a trainer at the end of an epoch, as tensors and plain data.

    streams_by_rank: `capture_streams` of every process. The names of the keys are those of sidecars: to change one,
    raise sidecar.FORMAT.
    """
    state = _training_state(trainer) | {
        "streams": streams_by_rank,
        "epoch": trainer.epoch,
        "device": trainer.device.type,
        "content": trainer.content_hash,
        "threads": torch.get_num_threads(),
        "names": dict(trainer.data["names"]),
        "precisions": [name_of(paired.teacher.settings.dtype) for paired in trainer.plan.teachers],
        "teachers": [paired.sha256 for paired in trainer.plan.teachers],
    }
    if trainer.criterion is not None:
        state |= {"criterion": trainer.criterion.private_state(), "measured": trainer.criterion.recorder.last}
    return state


def _training_state(trainer: Any) -> State:
    """Return weights, averages, optimizer, gradients that wait for it, scores and results.csv."""
    model = unwrap_model(trainer.model)
    return {
        "model": model.state_dict(),
        "gradients": {k: p.grad for k, p in model.named_parameters() if p.grad is not None},
        "pending": trainer.steps.pending,
        "own": split_keys(vars(trainer.args)).distillation,
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


def capture_streams(loader: Any) -> State:
    """Return this process's random state, its samplers', and the indices of the images in the mosaic's buffers."""
    return {
        "random": random_state(),
        "sampler": loader.generator.get_state() if loader.generator is not None else None,
        "buffer": list(getattr(loader.dataset, "buffer", [])),
        "drawn": loader.dataset.draws.drawn if isinstance(loader.dataset, MixedDataset) else 0,
        "images": image_names_hash(loader.dataset),  # the buffer and the sampler refer to images by index
    }


def check_state(trainer: Any, state: State) -> None:
    """Raise ValueError, naming the part, if a state does not fit the trainer's model, optimizer, adapters or images."""
    model = unwrap_model(trainer.model)
    with_gradient = {key: value for key, value in model.named_parameters() if key in state["gradients"]}
    _check_tensors("model", state["model"], model.state_dict())
    _check_tensors("ema.state", state["ema"]["state"], trainer.ema.ema.state_dict())
    _check_tensors("gradients", state["gradients"], with_gradient)
    _check_optimizer(state["optimizer"], trainer.optimizer)
    if trainer.criterion is not None and not trainer.adapters_changed:
        _check_tensors("criterion", state["criterion"], trainer.criterion.private_state())
    dataset = trainer.train_loader.dataset
    for streams in state["streams"]:
        last = max(streams["buffer"], default=-1)
        if streams["images"] == image_names_hash(dataset) and last >= len(dataset.im_files):
            raise ValueError(f"its streams.buffer: there is no image {last}")


def _check_tensors(part: str, saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors saved have the names and shapes of the live ones."""
    for key in dict.fromkeys([*live, *saved]):
        if key not in saved or key not in live:
            raise ValueError(f"its {part}.{key} {'is missing' if key in live else 'has no place in this run'}")
        if saved[key].shape != live[key].shape:
            shapes = f"{list(saved[key].shape)} instead of {list(live[key].shape)}"
            raise ValueError(f"its {part}.{key} has the shape {shapes}")


def optimizer_fits(saved: Mapping[str, Any] | None, live: Optimizer) -> bool:
    """Return whether the state of an optimizer is that of the live one's parameters."""
    try:
        _check_optimizer(saved or {"param_groups": [], "state": {}}, live)
    except ValueError:
        return False
    return True


def _check_optimizer(saved: Mapping[str, Any], live: Optimizer) -> None:
    """Raise ValueError unless the saved values of each parameter are those of its group, in the parameter's shape."""
    counts = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], live.param_groups)]
    if counts[0] != counts[1]:
        raise ValueError(f"its optimizer.param_groups hold {counts[0]} parameters instead of {counts[1]}")
    for saved_group, group in zip(saved["param_groups"], live.param_groups, strict=True):
        kinds: dict[str, type] = {}  # of the values that each parameter of the group has
        for index, parameter in zip(saved_group["params"], group["params"], strict=True):
            values = saved["state"].get(index, {})
            kinds = kinds or {name: type(value) for name, value in values.items()}
            if values and kinds != {name: type(value) for name, value in values.items()}:
                raise ValueError(f"its optimizer.state.{index} holds other values than its group")
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    shapes = f"{list(value.shape)} instead of {list(parameter.shape)}"
                    raise ValueError(f"its optimizer.state.{index}.{name} has the shape {shapes}")


def restore_state(trainer: Any, state: State) -> None:
    """Restore weights, averages, optimizer, scores and results.csv in place."""
    unwrap_model(trainer.model).load_state_dict(state["model"])
    trainer.ema.ema.load_state_dict(state["ema"]["state"])
    trainer.ema.updates = state["ema"]["updates"]
    for saved, group in zip(state["optimizer"]["param_groups"], trainer.optimizer.param_groups, strict=True):
        saved["fused"] = group.get("fused")  # depends on the device of this run
    trainer.optimizer.load_state_dict(state["optimizer"])
    if state["scaler"]:  # a disabled scaler, as on CPUs, has no state
        trainer.scaler.load_state_dict(state["scaler"])
    # Without the patience, which the user may change.
    vars(trainer.stopper).update({k: v for k, v in state["stopper"].items() if k != "patience"})
    trainer.best_fitness, trainer.fitness = state["best_fitness"], state["fitness"]
    trainer.metrics = state["metrics"]
    if IS_MAIN:
        restore_csv(trainer, state)


def restore_csv(trainer: Any, state: State) -> None:
    """Write results.csv as it was: epochs after the checkpoint are trained, and written, again."""
    if state["csv"]:
        with atomic_path(trainer.csv) as temporary:
            temporary.write_text(state["csv"], encoding="utf-8")


def restore_streams(trainer: Any, state: State) -> None:
    """Restore gradients, random state and the mosaic's buffer; call it last before the first batch.

    Warns if the run cannot continue exactly: with data workers, other images, or another number of processes.
    """
    trainer.steps.pending = state["pending"]
    for name, parameter in unwrap_model(trainer.model).named_parameters():
        if name in state["gradients"] and parameter.requires_grad:  # it may have been frozen since
            parameter.grad = state["gradients"][name].to(parameter.device)
    loader, streams = trainer.train_loader, state["streams"]
    if loader.num_workers:
        LOGGER.warning(
            "resume: not exact, because the random state of data workers is not saved; with workers=0 it would be"
        )
    if len(streams) != WORLD_SIZE:
        LOGGER.warning(f"resume: not exact, the run began with {len(streams)} processes and now has {WORLD_SIZE}")
        return
    saved = streams[max(RANK, 0)]
    if saved["images"] != image_names_hash(loader.dataset):
        LOGGER.warning("resume: not exact, because the training images are not those that the run began with")
        return
    if state.get("content", trainer.content_hash) != trainer.content_hash:
        LOGGER.warning("resume: not exact, because images or labels have changed since the run began")
    if trainer.device.type == "cpu" and state.get("threads", torch.get_num_threads()) != torch.get_num_threads():
        threads = f"{state['threads']} threads and now has {torch.get_num_threads()}"
        LOGGER.warning(f"resume: not exact, the run began with {threads}, which sum in another order")
    if trainer.device.type == "cuda" and len(saved["random"]["cuda"]) != torch.cuda.device_count():
        devices = f"{len(saved['random']['cuda'])} CUDA devices and now has {torch.cuda.device_count()}"
        LOGGER.warning(f"resume: not exact, the run began with {devices}, and their random state is not restored")
    for index in saved["buffer"] if not loader.num_workers else []:
        loader.dataset.load_image(index)  # fills the buffer in its old order
    loader.iterator = loader._get_iterator()
    for _ in range(0 if loader.num_workers else len(loader)):
        loader.iterator._next_index()  # uses up one pass of the endless sampler: the next epoch then draws a new order
    if isinstance(loader.dataset, MixedDataset):
        loader.dataset.draws.drawn = saved.get("drawn", 0)
    if saved["sampler"] is not None:
        loader.generator.set_state(saved["sampler"])
    set_random_state(saved["random"])


def _plain(value: Any) -> Any:
    """Return Python numbers for NumPy's and torch's, in a value or in a dict of them."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value.item() if isinstance(value, np.generic | torch.Tensor) else value
