"""What a training left: the rows of its results.csv, its weights, its sidecar."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.training.resume.sidecar import sidecars


def rows(run: Any) -> list[dict[str, float]]:
    """Return the rows of results.csv; fail if one has more or fewer cells than the header.

    run: a trainer, or a run's folder.
    """
    with open(run / "results.csv" if isinstance(run, Path) else run.csv) as f:
        header, *lines = csv.reader(f)
    return [{k.strip(): float(v) for k, v in zip(header, line, strict=True)} for line in lines]


def repeatable_rows(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run's results.csv without the seconds, which differ between equal runs."""
    return [{k: v for k, v in row.items() if k != "time"} for row in rows(folder)]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Return a copy of the state_dict of a trainer's model."""
    return {k: v.clone() for k, v in unwrap_model(trainer.model).state_dict().items()}


def saved_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return the state_dict of the model in a checkpoint."""
    state: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=False)["model"].state_dict()
    return state


def states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Return whether two state_dicts have the same names and the same values, to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def small_sidecar(run: Path) -> dict[str, Any]:
    """Return the content of a run's sidecar with all its parts, but hardly any tensors: tests write it often."""
    (file,) = sidecars(run / "weights" / "last.pt")
    optimizer = {"state": {}, "param_groups": [{"params": [0], "lr": 0.1}]}
    small = {"model": {}, "ema": {"state": {}, "updates": 1}, "optimizer": optimizer, "criterion": {}}
    return torch.load(file, weights_only=True) | small
