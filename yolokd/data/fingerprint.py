"""Hashes of the images and labels that a training sees."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.data.utils import img2label_paths


def image_names_hash(dataset: Any) -> str:
    """Return a hash of the images' names, in order. dataset: Ultralytics' data set of a training."""
    return hashlib.sha256(
        "\n".join(Path(f).name for f in dataset.im_files).encode(errors="surrogateescape")
    ).hexdigest()


def content_hash(dataset: Any) -> str:
    """Return a hash of the images' sizes in bytes and of their labels, in order."""
    content = hashlib.sha256()
    for file, label in zip(dataset.im_files, dataset.labels, strict=True):
        content.update(str(Path(file).stat().st_size).encode())
        keypoints = [] if label.get("keypoints") is None else [label["keypoints"]]
        for values in (label["cls"], label["bboxes"], *keypoints, *label.get("segments", ())):
            content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()


def files_hash(images: Iterable[Path]) -> str:
    """Return a hash of images' names and sizes in bytes, and of their label files, without a scan by Ultralytics."""
    content = hashlib.sha256()
    for image in sorted(images):
        label = Path(img2label_paths([str(image)])[0])
        content.update(f"{image.name} {image.stat().st_size} ".encode(errors="surrogateescape"))
        content.update(label.read_bytes() if label.is_file() else b"-")
    return content.hexdigest()
