"""What the folder of a run tells: whether its training is complete, and its scores epoch by epoch."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import polars as pl

from yolokd.models.checkpoint import load_model
from yolokd.training.sidecar import sidecars


def is_trained(last: Path) -> bool:
    """Return whether a run of yolokd is complete, its final evaluation included. last: its last.pt."""
    return last.exists() and saved_epoch(last) < 0 and not sidecars(last)


def saved_epoch(last: Path) -> int:
    """Return the epoch that a checkpoint names: -1 once the training is finished."""
    return int(load_model(last, "resume")[1].get("epoch", -1))


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
