"""Random detectors, and checkpoints of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from ultralytics import YOLO
from ultralytics.data.augment import LetterBox
from ultralytics.nn.tasks import DetectionModel

from helpers.data import NAMES
from yolokd.config.parse import parse
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.models.detector import dense_heads, read_pyramid
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.pyramid.pairing import Pairing, pair_classes, pair_levels

# Ultralytics' architectures with a fraction of the width: most of a short training's time goes into its checkpoints.
MODELS = Path(__file__).parents[1] / "data" / "models"
YOLOV8N, YOLOV8S = str(MODELS / "yolov8n.yaml"), str(MODELS / "yolov8s.yaml")
YOLO26N, YOLO26S = str(MODELS / "yolo26n.yaml"), str(MODELS / "yolo26s.yaml")
RTDETR = str(MODELS / "rtdetr-tiny.yaml")
SIZE = 160  # pixels; the image size that `save_trained_checkpoint` writes into checkpoints


def random_detector(cfg: str = YOLOV8N, names: dict[int, str] = NAMES, seed: int = 0) -> DetectionModel:
    """Return a random model with random BatchNorm statistics, so that its maps vary."""
    torch.manual_seed(seed)
    model = DetectionModel(cfg, nc=len(names), verbose=False)
    model.names = dict(names)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def calibrated_detector(cfg: str, images: Sequence[np.ndarray], size: int) -> nn.Module:
    """Return a random detector whose scores and boxes are rescaled so that it detects a few things in the images."""
    return calibrate(random_detector(cfg), images, size)


def calibrate(model: Any, images: Sequence[np.ndarray], size: int) -> nn.Module:
    """Rescale a model's scores and boxes as `calibrated_detector` says, and return it."""
    letterbox = LetterBox((size, size))
    letterboxed = np.stack([letterbox(image=image)[..., ::-1].transpose(2, 0, 1) for image in images])
    batch = torch.from_numpy(letterboxed).float() / 255
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(batch)
        raw = model.eval()(batch)[1]
        head = model.model[-1]
        _calibrate(head, head.one2many, raw.get("one2many", raw)["scores"])
        if "one2one" in raw:
            _calibrate(head, head.one2one, raw["one2one"]["scores"])
    return model


def _calibrate(head: Any, branch: dict[str, nn.Module], logits: torch.Tensor) -> None:
    scale = 1.5 / float(logits.std())
    shift = -1.0 - scale * float(logits.amax(1).flatten().quantile(0.98))  # 2 % of the positions score above 0.27
    for box, classes, stride in zip(branch["box_head"], branch["cls_head"], head.stride.tolist(), strict=True):
        classes[-1].weight.mul_(scale)
        classes[-1].bias.mul_(scale).add_(shift)
        # Boxes about sixty pixels wide: those of neighbouring positions overlap, so that NMS has to choose.
        side = torch.tensor(30 / stride)
        box[-1].weight.mul_(0.3)
        box[-1].bias.copy_((-((torch.arange(head.reg_max) - side) ** 2)).repeat(4) if head.reg_max > 1 else side)


def save_checkpoint(model: nn.Module, path: Path) -> Path:
    """Save a model as a checkpoint, as Ultralytics' trainer does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.half(), "ema": None, "train_args": {}, "epoch": -1, "optimizer": None}, path)
    model.float()
    return path


def save_trained_checkpoint(model: nn.Module, data: str, path: Path) -> Path:
    """Save a checkpoint whose training arguments name the data set `data` and the image size SIZE."""
    content = torch.load(save_checkpoint(model, path), weights_only=False)
    torch.save(content | {"train_args": {"data": data, "imgsz": SIZE}}, path)
    return path


def label_with(model: nn.Module, data: Path, size: int, path: Path, **settings: Any) -> None:
    """Replace the labels of the validation set by a detector's predictions, so that it scores well without training.

    settings: further ones of Ultralytics' validation.
    """
    keys = settings | {"imgsz": size, "conf": 0.3, "plots": False, "project": path.parent, "device": "cpu"}
    predictions = YOLO(save_checkpoint(model, path)).val(data=data, save_txt=True, **keys).save_dir / "labels"
    for label in (data.parent / "labels" / "val").glob("*.txt"):
        predicted = predictions / label.name
        label.write_text(predicted.read_text() if predicted.exists() else "")


def attach_criterion(teacher: DetectionModel, student: DetectionModel, **keys: Any) -> DistillationCriterion:
    """Put a student into training mode; return its criterion. keys: yolokd's own, for example method=."""
    config = parse({"teacher": "t", "level_weights": "uniform", **keys})
    return DistillationCriterion(
        student.train(), [(detector_teacher(teacher), pair(teacher, student, config.classes_map))], config, seed=0
    )


def pair(teacher: DetectionModel, student: DetectionModel, classes_map: dict[str, str] | None = None) -> Pairing:
    """Return the pairing of a teacher and a student with maps at the strides 8, 16 and 32."""
    frozen, pyramid = detector_teacher(teacher), read_pyramid(student)
    heads = ({s: head.shape for s, head in h.items()} for h in (frozen.heads, dense_heads(student.model[-1], pyramid)))
    shapes = pair_levels(frozen.pyramid, pyramid, *heads)
    return Pairing(tuple(shapes), (8, 16, 32), pair_classes(teacher.names, student.names, classes_map))
