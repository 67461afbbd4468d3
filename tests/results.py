"""What a training left, and how to cut one off."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.utils.torch_utils import unwrap_model

from yolokd import YoloDistiller


def rows(trainer: Any) -> list[dict[str, float]]:
    """Of results.csv; each has a number for each column."""
    with open(trainer.csv) as f:
        header, *lines = csv.reader(f)
    return [{k.strip(): float(v) for k, v in zip(header, line, strict=True)} for line in lines]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in unwrap_model(trainer.model).state_dict().items()}


class Stop(Exception):
    """A cut in the middle of a run."""


def cut(model: YoloDistiller | YOLO, keys: dict[str, Any], epoch: int = 0) -> None:
    """Train until the checkpoint of an epoch, from 0, is saved."""

    def stop(trainer: Any) -> None:
        if trainer.epoch == epoch:
            raise Stop

    model.add_callback("on_model_save", stop)
    with pytest.raises(Stop):
        model.train(**keys)
