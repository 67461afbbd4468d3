"""The sidecar of last.pt: a file beside it with all that an exact resume needs, as tensors and plain data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    InstanceOf,
    NonNegativeInt,
    ValidationError,
    model_validator,
)
from torch import Tensor

from yolokd.data.class_names import ClassNames
from yolokd.errors import UserError, describe_invalid
from yolokd.models.checkpoint import SavedGroup, load_model
from yolokd.runtime.files import atomic_path
from yolokd.runtime.rng import preserve_random_state, set_random_state
from yolokd.version import __version__

State = dict[str, Any]
Tensors: TypeAlias = dict[str, InstanceOf[Tensor]]

FORMAT = 1  # of sidecars: raise it when older ones can no longer be read


def _check_random_state(state: State) -> State:
    """Raise ValueError unless the random states of Python, NumPy and torch can be set to `state`."""
    try:
        with preserve_random_state():
            set_random_state(state)
    except Exception as e:  # each of the three raises its own
        raise ValueError("is not a random state") from e
    return state


def _check_sampler_state(state: Tensor) -> Tensor:
    try:
        torch.Generator().set_state(state)
    except (RuntimeError, TypeError) as e:
        raise ValueError("is not the state of a random generator") from e
    return state


class Average(BaseModel):
    """The averaged weights."""

    state: Tensors
    updates: NonNegativeInt


class OptimizerGroup(SavedGroup):
    """A group of an optimizer's parameters."""

    lr: float


class OptimizerState(BaseModel):
    """The state of an optimizer, as torch saves it: values by the index of a parameter, and groups of indices."""

    state: dict[int, dict[str, Any]]
    param_groups: list[OptimizerGroup]


class ScalerState(BaseModel):
    """The state of a gradient scaler that is in use, as torch saves it."""

    scale: float
    growth_factor: float
    backoff_factor: float
    growth_interval: int
    growth_tracker: Annotated[int, Field(alias="_growth_tracker")]


class StopperState(BaseModel):
    """The state of Ultralytics' early stopping."""

    best_fitness: float | None
    best_epoch: int
    possible_stop: bool


class Streams(BaseModel):
    """The random state of one process, of its samplers, and the indices of the images in its mosaic's buffers.

    drawn: the number of unlabelled images that it has drawn; sidecars of earlier versions do not hold it.
    """

    random: Annotated[State, AfterValidator(_check_random_state)]
    sampler: Annotated[InstanceOf[Tensor], AfterValidator(_check_sampler_state)] | None
    buffer: list[NonNegativeInt]
    drawn: NonNegativeInt = 0
    images: str


class SidecarContent(BaseModel):
    """The parts of a sidecar and their types.

    own: yolokd's keys. gradients: those that wait for the optimizer, by parameter; pending: of how many batches.
    stop: whether training is over. fitness, metrics: of the last validation. csv: the text of results.csv.
    streams: one for each process, by rank. teachers: their SHA-256. precisions: in which they run. criterion: its
    `private_state`. measured: the last means of gradients. content: a hash of images and labels. threads: torch's.
    Sidecars of earlier versions hold neither content nor threads.
    """

    epoch: NonNegativeInt
    device: str
    names: ClassNames
    own: State
    model: Tensors
    gradients: Tensors
    pending: NonNegativeInt
    ema: Average
    optimizer: OptimizerState
    scaler: ScalerState | Annotated[State, Field(max_length=0)]
    stopper: StopperState
    stop: bool
    best_fitness: float | None
    fitness: float | None
    metrics: dict[str, float] | None
    csv: str
    streams: list[Streams]
    teachers: list[str]
    precisions: list[str]
    criterion: Tensors | None = None
    measured: dict[str, float] | None = None
    content: str | None = None
    threads: int | None = None

    @model_validator(mode="after")
    def _check_criterion(self) -> SidecarContent:
        if self.teachers and (self.criterion is None or self.measured is None):
            raise ValueError("criterion or measured is missing, which a run with a teacher has")
        return self


def sidecar_path(checkpoint: Path, epoch: int) -> Path:
    """Return the path of the sidecar of `checkpoint` at an epoch, from 0.

    It lies beside the checkpoint, under a name that Ultralytics does not look for. Each epoch has its own name, so that
    the new sidecar exists before the checkpoint is replaced, and the old one until after.
    """
    return checkpoint.with_name(f"distill-{checkpoint.stem}-{epoch}.pt")


def sidecars(checkpoint: Path) -> list[Path]:
    """Return the sidecars beside `checkpoint`, oldest first: one, or two while the checkpoint is being replaced."""
    name = re.compile(rf"distill-{re.escape(checkpoint.stem)}-(\d+)\.pt")
    matches = [match for path in checkpoint.parent.glob("distill-*.pt") if (match := name.fullmatch(path.name))]
    return [checkpoint.with_name(match[0]) for match in sorted(matches, key=lambda match: int(match[1]))]


def save_sidecar(checkpoint: Path, epoch: int, state: State) -> None:
    """Write a state beside `checkpoint`, atomically."""
    with atomic_path(sidecar_path(checkpoint, epoch)) as temporary:
        torch.save({"format": FORMAT, "yolokd": __version__} | state, temporary)


def load_sidecar(checkpoint: Path, epoch: int) -> State | None:
    """Return the state in the sidecar of an epoch, or None if there is none; runs no code from the file.

    epoch: -1, which a finished checkpoint holds, means the newest sidecar.
    Raises UserError if the file cannot be read, if a part of it is missing or has a wrong type, or if another version
    of yolokd wrote it in another format.
    """
    paths = sidecars(checkpoint) if epoch < 0 else [sidecar_path(checkpoint, epoch)]
    if not paths or not paths[-1].is_file():
        return None
    try:
        state: State = torch.load(paths[-1], map_location="cpu", weights_only=True)
        written = state.get("format")
    except Exception as e:
        raise UserError(f"resume={checkpoint}", f"its sidecar {paths[-1].name} is unreadable", "start a new run") from e
    if written != FORMAT:
        why = f"its sidecar {paths[-1].name} has the format of yolokd {state.get('yolokd', 'before 0.1.0')}"
        raise UserError(f"resume={checkpoint}", why, "resume with that version, or start a new run")
    try:
        SidecarContent.model_validate(state, strict=True)
    except ValidationError as e:
        raise sidecar_error(checkpoint, paths[-1].name, describe_invalid(e)) from e
    return state


def sidecar_error(checkpoint: Path, name: str, problem: str) -> UserError:
    """Return the error for a sidecar from which `checkpoint` cannot be resumed. name: of its file."""
    cure = f"remove {name} to go on from the checkpoint alone, which is not exact, or start a new run"
    return UserError(f"resume={checkpoint}", f"its sidecar {name} is broken: {problem}", cure)


def drop_sidecars(checkpoint: Path, but_epoch: int | None = None) -> None:
    """Remove all sidecars except that of `but_epoch`."""
    kept = None if but_epoch is None else sidecar_path(checkpoint, but_epoch)
    for path in sidecars(checkpoint):
        if path != kept:
            path.unlink(missing_ok=True)


def is_trained(last: Path) -> bool:
    """Return whether a run of yolokd is complete, its final evaluation included. last: its last.pt."""
    return last.exists() and saved_epoch(last) < 0 and not sidecars(last)


def saved_epoch(last: Path) -> int:
    """Return the epoch that a checkpoint names: -1 once the training is finished."""
    return int(load_model(last, "resume")[1].get("epoch", -1))
