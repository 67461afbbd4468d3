"""Detections of the teacher, batch by batch, by Ultralytics' own prediction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import Any

from ultralytics.nn.modules.head import OBB

from yolokd.commands.label.settings import DetectionSettings
from yolokd.data.dataset import Image, read_image
from yolokd.distiller import load_yolo
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_teacher
from yolokd.models.detector import check_detector, image_channels


@dataclass(frozen=True)
class Detection:
    """A detected object: its class, and its box's center, width and height as shares of the image's sides."""

    label: int
    box: tuple[float, float, float, float]


class LabellingTeacher:
    """A trained detector that labels images.

    Raises UserError if the file holds no detector of upright boxes, and for a class in the settings that it lacks.
    """

    def __init__(self, file: str, settings: DetectionSettings, device: str, trust: bool) -> None:
        model = load_teacher(file, trust)
        check_detector(model, f"teacher={file}")
        if isinstance(model.model[-1], OBB):
            raise UserError(f"teacher={file}", "detects rotated boxes", "give a detector of upright ones")
        self.path = Path(model.pt_path)
        self.names: dict[int, str] = dict(model.names)
        self.channels = image_channels(model)
        for label in settings.classes or ():
            if label not in self.names:
                last = len(self.names) - 1
                raise UserError(f"classes={settings.classes}", f"the teacher has no class {label}", f"give 0 to {last}")
        self._yolo = load_yolo(self.path, trust)
        self._keys = settings.model_dump(exclude_none=True) | {"device": device, "verbose": False}

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """Return the detections in each image (height, width, channels)."""
        results = self._yolo.predict(list(images), **self._keys) if images else []
        return [_detections(result.boxes) for result in results]


def _detections(boxes: Any) -> list[Detection]:
    """Return the detections in Ultralytics' boxes; those that lie outside the image have no area and are dropped."""
    found = zip(boxes.cls.int().tolist(), boxes.xywhn.tolist(), strict=True)
    return [Detection(label, tuple(box)) for label, box in found if box[2] > 0 and box[3] > 0]


def read_batches(files: Sequence[Sequence[Path]], channels: int) -> Iterator[list[Image | None]]:
    """Yield the images of each batch of files, None for one that cannot be read; read one batch ahead, in a thread.

    channels: that an image must have.
    """

    def read(batch: Sequence[Path]) -> list[Image | None]:
        return [read_image(file, channels) for file in batch]

    with ThreadPool(1) as pool:  # one thread: Pillow's plugins, which read some formats, do not load in several
        ahead: AsyncResult[list[Image | None]] | None = None
        for batch in files:
            current, ahead = ahead, pool.apply_async(read, (batch,))
            if current is not None:
                yield current.get()
        if ahead is not None:
            yield ahead.get()
