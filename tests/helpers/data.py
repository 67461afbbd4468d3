"""Small data sets and batches, made from random numbers."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

NAMES = {0: "disc", 1: "box"}


def write_dataset(root: Path, names: dict[int, str] = NAMES, train: int = 12, val: int = 6, size: int = 80) -> Path:
    """Write noise images with discs and boxes as JPEGs with YOLO labels; return the path of data.yaml."""
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


def two_images() -> dict[str, torch.Tensor]:
    """Return a batch of two noise images with a box in each."""
    boxes = {"cls": torch.zeros(2, 1), "bboxes": torch.full((2, 4), 0.4), "batch_idx": torch.arange(2.0)}
    return {"img": torch.rand(2, 3, 64, 64), **boxes}
