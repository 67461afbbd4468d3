"""Every family of detectors that the installed Ultralytics builds, in a tiny size."""

from __future__ import annotations

from pathlib import Path

import torch
import ultralytics
import yaml
from torch import nn
from ultralytics.nn.tasks import DetectionModel, RTDETRDetectionModel

from helpers.data import NAMES

CONFIGS = Path(ultralytics.__file__).parent / "cfg" / "models"
WIDTH = 1 / 16  # of the channels in the .yaml
WIDER = {"12": 1 / 4}  # its attention needs a multiple of 32 channels
# {name in tables: (Ultralytics' .yaml, name of the tiny one, from which Ultralytics reads the size n)}
FAMILIES = {
    "v3": ("v3/yolov3.yaml", "yolov3n.yaml"),
    "v3-tiny": ("v3/yolov3-tiny.yaml", "yolov3n-tiny.yaml"),
    "v5": ("v5/yolov5.yaml", "yolov5n.yaml"),
    "v5-p6": ("v5/yolov5-p6.yaml", "yolov5n-p6.yaml"),
    "v6": ("v6/yolov6.yaml", "yolov6n.yaml"),
    "v8": ("v8/yolov8.yaml", "yolov8n.yaml"),
    "v8-p2": ("v8/yolov8-p2.yaml", "yolov8n-p2.yaml"),
    "v8-p6": ("v8/yolov8-p6.yaml", "yolov8n-p6.yaml"),
    "v9": ("v9/yolov9t.yaml", "yolov9t.yaml"),
    "v10": ("v10/yolov10n.yaml", "yolov10n.yaml"),
    "11": ("11/yolo11.yaml", "yolo11n.yaml"),
    "12": ("12/yolo12.yaml", "yolo12n.yaml"),
    "26": ("26/yolo26.yaml", "yolo26n.yaml"),
    "26-p2": ("26/yolo26-p2.yaml", "yolo26n-p2.yaml"),
    "26-p6": ("26/yolo26-p6.yaml", "yolo26n-p6.yaml"),
    "RT-DETR": ("v8/yolov8-rtdetr.yaml", "yolov8n-rtdetr.yaml"),
}


def tiny_config(family: str, folder: Path) -> Path:
    """Write a family's .yaml in a tiny size into a folder, and return it."""
    source, name = FAMILIES[family]
    config = yaml.safe_load((CONFIGS / source).read_text(encoding="utf-8"))
    config["scales"] = {"n": [0.33, WIDER.get(family, WIDTH), 1024]}
    (folder / name).write_text(yaml.safe_dump(config))
    return folder / name


def random_model(config: Path) -> nn.Module:
    """Return a random model of a .yaml, whose maps are finite and vary."""
    torch.manual_seed(0)
    kind = RTDETRDetectionModel if "rtdetr" in config.name else DetectionModel
    model: nn.Module = kind(str(config), nc=len(NAMES), verbose=False)
    model.names = dict(NAMES)
    return model.eval()
