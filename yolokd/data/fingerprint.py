"""Hashes of the images and labels that a training sees."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np


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
        for values in (label["cls"], label["bboxes"]):
            content.update(np.ascontiguousarray(values).tobytes())
    return content.hexdigest()
