"""Some labelled validation images, as a training sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from ultralytics.data.build import build_yolo_dataset

from yolokd.data.dataset import Image, as_batch, read_image, spread, uncached
from yolokd.patches.no_ghostscript import no_ghostscript
from yolokd.patches.safe_loading import safe_loading
from yolokd.runtime.console import warnings_only

SAMPLES = 6  # ours: the number of images in a report

Numbers = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Boxes:
    """Boxes in an image: corners (N, 4), left, top, right, bottom as shares of its sides, classes, and scores.

    A class of -1 is one that the data set does not have. The scores of labels are 1. outlines, keypoints: of each box,
    points (K, 2) as shares of the image's sides; empty for tasks that have none. outlines: of masks and rotated boxes.
    """

    corners: Numbers
    classes: npt.NDArray[np.int64]
    scores: Numbers
    outlines: tuple[Numbers, ...] = ()
    keypoints: tuple[Numbers, ...] = ()

    def __len__(self) -> int:
        return len(self.classes)

    def select(self, kept: npt.NDArray[np.bool_]) -> Boxes:
        """Return the boxes in a mask (N,)."""
        outlines, keypoints = (tuple(compress(points, kept)) for points in (self.outlines, self.keypoints))
        return Boxes(self.corners[kept], self.classes[kept], self.scores[kept], outlines, keypoints)


NO_BOXES = Boxes(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32))


@dataclass(frozen=True)
class Frame:
    """Where an image lies in the square of `size` pixels that the models see, in pixels of that square."""

    size: int
    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Sample:
    """An image (height, width, channels), three channels as BGR, and its labels."""

    file: Path
    image: Image
    labels: Boxes

    def frame(self, size: int) -> Frame:
        """Return where Ultralytics' letterbox puts the image in a square."""
        height, width = self.image.shape[:2]
        scale = min(size / height, size / width)
        height, width = round(height * scale), round(width * scale)
        return Frame(size, round((size - width) / 2 - 0.1), round((size - height) / 2 - 0.1), width, height)


def validation_samples(data: dict[str, Any], args: Any, trust: bool = False) -> list[Sample]:
    """Return up to SAMPLES images, evenly spread over the labelled ones of the split that a training validates with.

    If no image has a label, they are spread over all images. args: Ultralytics' settings.
    """
    with safe_loading(trust), warnings_only():
        labels = build_yolo_dataset(uncached(args), data[args.split], 1, dict(data), mode="val").labels
    labels = sorted(labels, key=lambda label: str(label["im_file"]))
    chosen = spread([label for label in labels if len(label["cls"])] or labels, SAMPLES)
    labelled = [(Path(label["im_file"]), _boxes(label, args.task)) for label in chosen]
    read = [(file, _read(file, data["channels"]), boxes) for file, boxes in labelled]
    return [Sample(file, image, boxes) for file, image, boxes in read if image is not None]


def read_samples(files: Sequence[Path], channels: int) -> list[Sample]:
    """Return the images of some files, without labels; images that cannot be read or have other channels are left out.

    channels: that an image must have.
    """
    read = [(file, _read(file, channels)) for file in files]
    return [Sample(file, image, NO_BOXES) for file, image in read if image is not None]


def as_images(sample: Sample, size: int) -> Tensor:
    """Return a batch of the one image, letterboxed to a square: (1, C, size, size) float32 in 0..1."""
    return as_batch([sample.image], (size, size))


def _read(file: Path, channels: int) -> Image | None:
    with no_ghostscript():
        return read_image(file, channels)


def _boxes(label: Mapping[str, Any], task: str) -> Boxes:
    """Return the boxes of a label of Ultralytics' data set: centers, widths and heights as shares.

    The corners of rotated boxes are among its segments.
    """
    centers, sides = np.split(np.asarray(label["bboxes"], np.float32).reshape(-1, 4), 2, axis=1)
    corners = np.concatenate([centers - sides / 2, centers + sides / 2], axis=1)
    classes = np.asarray(label["cls"]).reshape(-1).astype(np.int64)
    outlines = tuple(label["segments"]) if task in ("segment", "obb") else ()
    keypoints = tuple(map(visible, label["keypoints"])) if task == "pose" else ()
    return Boxes(corners, classes, np.ones(len(classes), np.float32), outlines, keypoints)


def visible(keypoints: Numbers) -> Numbers:
    """Return the keypoints (K, 2) of an object that can be seen; of (K, 3), those whose third number is above 0.5.

    Labels have 0 there for unknown points and 1 or 2 for others; models give a score.
    """
    return keypoints[keypoints[:, 2] > 0.5, :2] if keypoints.shape[1] == 3 else keypoints
