"""Small models and data sets of the tasks beside detection."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.models import MODELS
from yolokd.data import shapes
from yolokd.models.tasks import TASKS

HEADS = {"segment": "Segment{}, [nc, 32, 256]", "pose": "Pose{}, [nc, kpt_shape]", "obb": "OBB{}, [nc, 1]"}
SUFFIXES = {"segment": "-seg", "pose": "-pose", "obb": "-obb", "detect": ""}
COUNTS = {"train": 8, "val": 4}


def write_model(folder: Path, task: str, family: str = "yolov8", scale: str = "n") -> str:
    """Write the .yaml of a small model of a task into a folder, and return its path."""
    text = (MODELS / f"{family}.yaml").read_text().replace("nc: 80", "nc: 80\nkpt_shape: [4, 3]")
    if task in HEADS:
        text = text.replace("Detect, [nc]", HEADS[task].format("26" if family == "yolo26" else ""))
    path = folder / f"{family}{scale}{SUFFIXES[task]}.yaml"
    path.write_text(text)
    return str(path)


def write_data(folder: Path, task: str) -> str:
    """Draw a few of the embedded images with the labels of a task, and return the path of data.yaml."""
    return str(shapes.ensure(root=folder, counts=COUNTS, name=TASKS[task].shapes))


def random_model(cfg: str, task: str, seed: int = 1) -> Any:
    """Return a random model of a task that knows the classes of the embedded images."""
    torch.manual_seed(seed)
    data: dict[str, Any] = {"nc": len(shapes.CLASSES), "channels": 3, "kpt_shape": [4, 3]}
    model = TASKS[task].build(cfg, data)
    model.names = dict(enumerate(shapes.CLASSES))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def save_model(path: Path, model: Any, task: str, **train_args: Any) -> str:
    """Save a model as a checkpoint, as Ultralytics' trainer does, and return the path."""
    train_args |= {"task": task}
    torch.save({"model": model.half(), "ema": None, "train_args": train_args, "epoch": -1, "optimizer": None}, path)
    return str(path)
