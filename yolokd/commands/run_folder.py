"""The folder of a run: whether it can be made, and its scores epoch by epoch."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import polars as pl

from yolokd.errors import UserError


def check_project(project: object) -> Path:
    """Return the absolute path of a folder for runs. Raises UserError if it cannot be made or written."""
    folder = Path(str(project)).absolute()
    if not _is_writable(folder):
        raise UserError(f"project={project}", "is no folder that can be written", "give another one")
    return folder


def _is_writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made and then written."""
    try:
        folder.stat()
    except FileNotFoundError:
        return _is_writable(folder.parent)
    except (OSError, ValueError):  # a file on the way, a name that is too long, a NUL in it
        return False
    return folder.is_dir() and os.access(folder, os.W_OK)


def read_history(results: Path) -> tuple[list[float], float]:
    """Return the mAP50-95 of each epoch in results.csv, and the seconds of all epochs; nothing if there is no file."""
    if not results.exists():
        return [], 0.0
    table = pl.read_csv(results, infer_schema_length=None)
    clock = [0.0, *table["time"].to_list()]
    # Ultralytics' clock starts at 0 again in a resumed run.
    seconds = sum(now - before if now >= before else now for before, now in pairwise(clock))
    # An epoch that was interrupted before its checkpoint was written is there twice: the second one counts.
    epochs = table.unique("epoch", keep="last", maintain_order=True)
    return epochs["metrics/mAP50-95(B)"].to_list(), seconds
