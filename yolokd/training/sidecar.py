"""The sidecar of last.pt: a file beside it with all that an exact resume needs, as tensors and plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from yolokd.errors import UserError
from yolokd.runtime.files import atomic_path
from yolokd.version import __version__

State = dict[str, Any]


FORMAT = 1  # of sidecars: raise it when older ones can no longer be read


def sidecar_path(checkpoint: Path, epoch: int) -> Path:
    """Return the path of the sidecar of `checkpoint` at an epoch, from 0.

    It lies beside the checkpoint, under a name that Ultralytics does not look for. Each epoch has its own name, so that
    the new sidecar exists before the checkpoint is replaced, and the old one until after.
    """
    return checkpoint.with_name(f"distill-{checkpoint.stem}-{epoch}.pt")


def sidecars(checkpoint: Path) -> list[Path]:
    """Return the sidecars beside `checkpoint`, oldest first: one, or two while the checkpoint is being replaced."""
    paths = checkpoint.parent.glob(f"distill-{checkpoint.stem}-*.pt")
    return sorted(paths, key=lambda path: int(path.stem.rpartition("-")[2]))


def save_sidecar(checkpoint: Path, epoch: int, state: State) -> None:
    """Write a state beside `checkpoint`, atomically."""
    with atomic_path(sidecar_path(checkpoint, epoch)) as temporary:
        torch.save({"format": FORMAT, "yolokd": __version__} | state, temporary)


def load_sidecar(checkpoint: Path, epoch: int) -> State | None:
    """Return the state in the sidecar of an epoch, or None if there is none; runs no code from the file.

    epoch: -1, which a finished checkpoint holds, means the newest sidecar.
    Raises UserError if the file cannot be read, or if another version of yolokd wrote it in another format.
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
    return state


def drop_sidecars(checkpoint: Path, but_epoch: int | None = None) -> None:
    """Remove all sidecars except that of `but_epoch`."""
    kept = None if but_epoch is None else sidecar_path(checkpoint, but_epoch)
    for path in sidecars(checkpoint):
        if path != kept:
            path.unlink(missing_ok=True)
