"""Shared fixtures: a tiny data set and tiny checkpoints, made on the spot."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("WANDB_MODE", "disabled")
if hasattr(os, "sched_setaffinity") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    cores = sorted(os.sched_getaffinity(0))  # a core for each process, or their threads would wait for each other
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

import cv2
import numpy as np
import torch
import yaml
from torch import nn
from ultralytics.data.augment import LetterBox
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from yolokd.config.parse import parse
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.models.detector import read_pyramid
from yolokd.models.teacher import Teacher
from yolokd.pyramid.pairing import Pairing, pair_classes, pair_levels

NAMES = {0: "disc", 1: "box"}
SIZE = 160  # of the exported models
collect_ignore = ["forked.py", "killed.py", "launched.py"]  # programs that tests run
TINY = {"imgsz": 64, "batch": 4, "nbs": 4, "plots": False, "verbose": False, "seed": 3, "patience": 50}


def save_checkpoint(model: nn.Module, path: Path) -> Path:
    """An Ultralytics checkpoint of a model, as its trainer would leave it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.half(), "ema": None, "train_args": {}, "epoch": -1, "optimizer": None}, path)
    model.float()
    return path


def random_detector(cfg: str = "yolov8n.yaml", names: dict[int, str] = NAMES, seed: int = 0) -> DetectionModel:
    """A random model whose batch norms have seen something, so that its maps vary."""
    torch.manual_seed(seed)
    model = DetectionModel(cfg, nc=len(names), verbose=False)
    model.names = dict(names)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def attached(teacher: DetectionModel, student: DetectionModel, **keys: Any) -> DistillationCriterion:
    """The criterion of a student in training mode, outside of a training; keys: yolokd's own."""
    shapes = pair_levels(read_pyramid(teacher), read_pyramid(student))
    pairing = Pairing(tuple(shapes), (8, 16, 32), pair_classes(teacher.names, student.names))
    config = parse({"teacher": "t", "level_weights": "uniform", **keys})
    return DistillationCriterion(student.train(), [(Teacher(teacher), pairing)], config, seed=0)


def two_images() -> dict[str, torch.Tensor]:
    """A batch of noise, with a box in each image."""
    boxes = {"cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.4), "batch_idx": torch.arange(2.0)}
    return {"img": torch.rand(2, 3, 64, 64), **boxes}


def write_dataset(root: Path, names: dict[int, str] = NAMES, train: int = 12, val: int = 6, size: int = 80) -> Path:
    """Photograph-sized noise with discs and boxes, as JPEGs and YOLO labels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = rng.integers(0, 90, (size, size + 16, 3), dtype=np.uint8)
            lines = []
            for _ in range(int(rng.integers(1, 4))):
                x, y = (int(rng.integers(20, n - 20)) for n in (size + 16, size))
                r, c = int(rng.integers(8, 18)), int(rng.integers(0, len(names)))
                color = tuple(int(v) for v in rng.integers(140, 255, 3))
                if c % 2:
                    cv2.rectangle(image, (x - r, y - r), (x + r, y + r), color, -1)
                else:
                    cv2.circle(image, (x, y), r, color, -1)
                x1, y1, x2, y2 = max(x - r, 0), max(y - r, 0), min(x + r, size + 16), min(y + r, size)
                box = ((x1 + x2) / 2 / (size + 16), (y1 + y2) / 2 / size, (x2 - x1) / (size + 16), (y2 - y1) / size)
                lines.append(" ".join([str(c), *(f"{v:.6f}" for v in box)]))
            cv2.imwrite(str(root / "images" / split / f"{i}.jpg"), image)
            (root / "labels" / split / f"{i}.txt").write_text("\n".join(lines))
    path = root / "data.yaml"
    path.write_text(yaml.safe_dump({"train": "images/train", "val": "images/val", "names": dict(names)}))
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(random_detector("yolov8s.yaml", seed=1), tmp_path_factory.mktemp("t") / "teacher.pt"))


@pytest.fixture
def tiny(data: str, tmp_path: Path) -> dict[str, Any]:
    """Settings of a training of seconds, in a folder of its own."""
    return {**TINY, "data": data, "project": str(tmp_path / "runs"), "epochs": 2, "check_teacher": False}


@contextmanager
def logged() -> Iterator[list[str]]:
    """What Ultralytics' logger says meanwhile."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    try:
        yield lines
    finally:
        LOGGER.removeHandler(handler)


def states_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, names included."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def sighted(cfg: str, images: Sequence[np.ndarray], size: int) -> nn.Module:
    """A random detector that tells places apart: it finds a few things in the images, as a trained one would."""
    model = random_detector(cfg)
    letterbox = LetterBox((size, size))
    batch = np.stack([letterbox(image=image)[..., ::-1].transpose(2, 0, 1) for image in images])
    pictures = torch.from_numpy(batch).float() / 255
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(pictures)
        raw = model.eval()(pictures)[1]
        head = model.model[-1]
        _calibrate(head, head.one2many, raw.get("one2many", raw)["scores"])
        if "one2one" in raw:
            _calibrate(head, head.one2one, raw["one2one"]["scores"])
    return model


def _calibrate(head: Any, branch: dict[str, nn.Module], logits: torch.Tensor) -> None:
    scale = 1.5 / float(logits.std())
    shift = -1.0 - scale * float(logits.amax(1).flatten().quantile(0.98))  # 2 % of the places score above 0.27
    for box, classes, stride in zip(branch["box_head"], branch["cls_head"], head.stride.tolist(), strict=True):
        classes[-1].weight.mul_(scale)
        classes[-1].bias.mul_(scale).add_(shift)
        # Boxes some sixty pixels wide: those of neighbouring places overlap, and NMS has work to do.
        side = torch.tensor(30 / stride)
        box[-1].weight.mul_(0.3)
        box[-1].bias.copy_((-((torch.arange(head.reg_max) - side) ** 2)).repeat(4) if head.reg_max > 1 else side)


def make_checkpoint(model: nn.Module, data: str, path: Path) -> Path:
    """A checkpoint of a model that was trained on `data`, it says."""
    content = torch.load(save_checkpoint(model, path), weights_only=False)
    torch.save(content | {"train_args": {"data": data, "imgsz": SIZE}}, path)
    return path
