"""The sidecar of last.pt: the file that holds what an exact resume needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from yolokd.errors import UserError
from yolokd.runtime.files import atomic_path
from yolokd.version import __version__

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
