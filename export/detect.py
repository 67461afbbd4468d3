#!/usr/bin/env python3
"""Find objects in images or a video with an ONNX file from `yolokd export`.

This file needs numpy, OpenCV and onnxruntime, and no other file:

    python detect.py best.onnx photo.jpg --json found.json

Or from Python:

    detector = Detector("best.onnx")
    for found in detector(cv2.imread("photo.jpg")):
        print(found.name, found.score, found.box)

Models of the tasks detect, segment, pose and obb work: an object then also has an outline, keypoints or corners.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Record = dict[str, Any]
Points = list[tuple[float, ...]]  # x, y of each, in pixels of the image; a keypoint also has a score
T = TypeVar("T")

IMAGES = {".avif", ".bmp", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEOS = {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
GREY = (114, 114, 114)  # the network was trained with images padded in this grey
FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}  # by ONNX Runtime's name
MAX_PIXELS = 2**28  # of an input batch (16384x16384): more would take over 3 GB
MAX_KEYPOINTS = 1000  # of an object
TASKS = ("detect", "segment", "pose", "obb")
MAX_METADATA = 2**20  # characters of one entry: reading a longer one would take much memory


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int and side > 0 for side in value)


def _is_names(value: Any) -> bool:
    return isinstance(value, dict) and all(type(k) is int and isinstance(v, str) for k, v in value.items())


# The metadata that are read: the value of a file that lacks the entry, and whether an entry's value is valid.
METADATA: dict[str, tuple[Any, Callable[[Any], bool]]] = {
    "names": ({}, _is_names),
    "stride": (32, lambda value: type(value) is int and 1 <= value <= MAX_PIXELS),
    "imgsz": ([640, 640], _is_size),
    "end2end": (False, lambda value: isinstance(value, bool)),
    "kpt_shape": ([0, 0], lambda value: _is_size(value) and value[0] <= MAX_KEYPOINTS and value[1] in (2, 3)),
    "args": ({}, lambda value: isinstance(value, dict)),
}


class DetectError(ValueError):
    """A mistake in what the user gave, as a message of one line; the command line exits with status 2."""


@dataclass(frozen=True)
class Detection:
    """One object: its class, its score in 0..1, and its box (x1, y1, x2, y2) in pixels of the image.

    polygons: the outlines of its mask; what lies inside two of them is a hole. keypoints: x, y and, if the model has
    it, the score of each. corners: the four of a rotated box, around which `box` is. Each is None unless the model's
    task is to find it.
    """

    class_id: int
    name: str
    score: float
    box: tuple[float, float, float, float]
    polygons: tuple[Points, ...] | None = None
    keypoints: Points | None = None
    corners: Points | None = None

    def record(self) -> Record:
        """Return the detection as a dict that JSON can hold."""
        box = [round(side, 3) for side in self.box]
        record: Record = {"class": self.class_id, "name": self.name, "score": round(self.score, 6), "box": box}
        if self.polygons is not None:
            record["polygons"] = [_rounded(polygon) for polygon in self.polygons]
        for name, points in (("keypoints", self.keypoints), ("corners", self.corners)):
            if points is not None:
                record[name] = _rounded(points)
        return record


def _rounded(points: Points) -> list[list[float]]:
    return [[round(value, 3) for value in point] for point in points]


@dataclass(frozen=True)
class _View:
    """Where an image lies in the padded one: a point x of the image is at x · scale + offset there."""

    height: int
    width: int
    scale: tuple[float, float]
    offset: tuple[int, int]

    def points(self, padded: Floats) -> Floats:
        """Return points (n, 2) of the padded image as points of the image."""
        return np.asarray((padded - self.offset) / self.scale, np.float32)

    def clipped(self, points: Floats) -> Floats:
        """Return points (n, 2) moved into the image."""
        return points.clip(0, np.array([self.width, self.height], np.float32))


class Detector:
    """An ONNX detector, called with one image at a time.

    imgsz: the side, or (height, width), that images are scaled to. The default is the exported size; only a dynamic
    model takes another one. providers: ONNX Runtime's execution providers; the default is CUDA if it is installed,
    else the CPU. run_seconds: how long the model alone took for each image so far.
    Raises DetectError if the file is missing, is not a detector, or can't run at `imgsz`.
    """

    def __init__(
        self,
        path: str | Path,
        imgsz: int | Sequence[int] | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        self.session = _session(Path(path), providers)
        try:
            own = self._read_signature()
        except (DetectError, UnicodeDecodeError) as e:
            problem = e if isinstance(e, DetectError) else "it holds a name that is not UTF-8"
            raise DetectError(f"{path}: not a YOLO detector: {problem}") from e
        self.size = self._choose_size(own if imgsz is None else imgsz, own)
        self.run_seconds: list[float] = []

    def _read_signature(self) -> Any:
        """Read what the file says about itself; return the height and width that it was exported for."""
        meta = _read_metadata(self.session)
        self.names: dict[int, str] = {key: _unicode(name) for key, name in meta["names"].items()}
        self.stride: int = meta["stride"]
        sources, outputs = self.session.get_inputs(), self.session.get_outputs()
        self.task, self.kpt_shape = meta["task"], meta["kpt_shape"]
        self.own = {"pose": math.prod(self.kpt_shape), "obb": 1}.get(self.task, 0)  # numbers beside box and scores
        has_masks = self.task != "segment" or (len(outputs) == 2 and _is_prototypes(outputs[1]))
        if self.task == "segment" and has_masks:
            self.own = outputs[1].shape[1]
        # With an end-to-end head or an embedded NMS, the output is final rows of x1, y1, x2, y2, score, class, own.
        chosen = meta["end2end"] or meta["args"].get("nms") is True
        self.final: bool = chosen or (bool(outputs) and self.task == "detect" and outputs[0].shape[-1:] == [6])
        channels = sources[0].shape[1] if len(sources) == 1 and len(sources[0].shape) == 4 else 3
        if isinstance(channels, int) and channels != 3:
            raise DetectError(f"this model takes images of {channels} channels, not of 3")
        fits = len(sources) == 1 and outputs and _is_image(sources[0]) and self._is_result(outputs[0]) and has_masks
        if not fits:
            tensors = ", ".join(f"{node.name} {node.type} {node.shape}" for node in (*sources, *outputs))
            raise DetectError(f"these tensors do not fit {len(self.names)} classes: {tensors or 'none'}")
        self.input, self.outputs = sources[0].name, [node.name for node in outputs[: 1 + (self.task == "segment")]]
        batch, _, *sides = sources[0].shape
        self.dtype = FLOATS[sources[0].type]
        self.batch = batch if isinstance(batch, int) else 1
        self.dynamic = not all(isinstance(side, int) for side in sides)
        return meta["imgsz"] if self.dynamic else sides

    def _is_result(self, output: Any) -> bool:
        """Return whether an output holds one row or column of the right length for each box."""
        return output.type in FLOATS and len(output.shape) == 3 and self._fits(output.shape[1:])

    def _fits(self, shape: Sequence[Any]) -> bool:
        # In some dynamic files, the sides of the output have names instead of numbers.
        expected, fields = (6, shape[1]) if self.final else (4 + len(self.names), shape[0])
        expected += self.own
        return (self.final or bool(self.names)) and (fields == expected or not isinstance(fields, int))

    def _choose_size(self, asked: Any, own: Sequence[int]) -> tuple[int, int]:
        sides = list(asked) if isinstance(asked, list | tuple) else [asked]
        if len(sides) not in (1, 2) or not all(type(side) is int and side > 0 for side in sides):
            raise DetectError(f"imgsz={asked}: give one positive side, or height and width")
        height, width = (-(-side // self.stride) * self.stride for side in (sides * 2)[:2])
        if not self.dynamic and [height, width] != list(own):
            raise DetectError(f"imgsz={asked}: this model runs at {own[0]}x{own[1]} only (export it with dynamic=True)")
        if self.batch * height * width > MAX_PIXELS:
            raise DetectError(f"imgsz={asked}: {self.batch} x {height}x{width} pixels are more than {MAX_PIXELS}")
        return height, width

    def __call__(self, image: Image, conf: float = 0.25, iou: float = 0.7, max_det: int = 300) -> list[Detection]:
        """Return the objects in an image (H, W, 3; BGR, uint8) that score above `conf`, best first.

        A box that overlaps a better box of its class by more than `iou` is dropped, unless the model chooses its boxes
        itself (end-to-end, or exported with nms=True). Raises DetectError for an image of another shape or type.
        """
        if image is None or image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            given = "None" if image is None else f"{image.shape} {image.dtype}"
            raise DetectError(f"an image must be (H, W, 3) uint8 in BGR order, not {given}")
        # Like Ultralytics' predictor: for a dynamic model, pad only to the next multiple of the stride.
        padded, scale, offset = letterbox(image, self.size, self.stride if self.dynamic else None)
        output, *prototypes = self._run(padded)
        if self.final:
            rows = output[output[:, 4] > conf]
        else:
            rows = suppress(output, conf, iou, len(self.names), rotated=self.task == "obb")
        view = _View(image.shape[0], image.shape[1], scale, offset)
        return [self._detection(row, view, padded.shape[:2], *prototypes) for row in rows[:max_det]]

    def _run(self, padded: Image) -> list[Floats]:
        """Run the model on a padded image (H, W, 3).

        Returns (4 + classes + own, anchors), or final rows (n, 6 + own); of a segmentation model also the prototypes.
        """
        tensor = padded[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255
        try:
            tensor = np.repeat(tensor.astype(self.dtype), self.batch, axis=0)
            start = time.perf_counter()
            outputs = [output[0].astype(np.float32) for output in self.session.run(self.outputs, {self.input: tensor})]
            self.run_seconds.append(time.perf_counter() - start)
        except Exception as e:  # ONNX Runtime's errors have no common class
            size = "x".join(map(str, padded.shape[:2]))
            raise DetectError(f"the model does not run at {size}: {_first_line(e)}; try another imgsz") from e
        output, *prototypes = outputs
        sound = output.ndim == 2 and self._fits(output.shape)
        sound = sound and all(each.ndim == 3 and len(each) == self.own and each.size for each in prototypes)
        # No coordinate is larger than an image. NaN is not smaller either.
        if not sound or not all((np.abs(each) < MAX_PIXELS).all() for each in outputs):
            shape = " ".join(str(each.shape) for each in outputs)
            raise DetectError(f"the model's output {shape} is broken: another shape than stated, NaN or infinity")
        return outputs

    def _detection(
        self, row: Floats, view: _View, size: tuple[int, int], prototypes: Floats | None = None
    ) -> Detection:
        """Return what a row of the padded image of `size` (height, width) says of the image itself."""
        class_id, own = int(row[5]), row[6:]
        corners = view.points(_corners(row[:4], float(own[0]))) if self.task == "obb" else None
        ends = view.points(row[:4].reshape(2, 2)) if corners is None else np.stack([corners.min(0), corners.max(0)])
        (x1, y1), (x2, y2) = view.clipped(ends).tolist()
        polygons: tuple[Points, ...] | None = None
        if prototypes is not None:
            polygons = mask_polygons(np.tensordot(own, prototypes, 1), (x1, y1, x2, y2), view, size)
        return Detection(
            class_id,
            self.names.get(class_id, str(class_id)),
            float(row[4]),
            (x1, y1, x2, y2),
            polygons,
            self._keypoints(own, view) if self.task == "pose" else None,
            None if corners is None else _as_points(corners),
        )

    def _keypoints(self, own: Floats, view: _View) -> Points:
        keypoints = own.reshape(self.kpt_shape)
        return _as_points(np.hstack([view.clipped(view.points(keypoints[:, :2])), keypoints[:, 2:]]))


def _as_points(points: Floats) -> Points:
    return [tuple(point) for point in points.tolist()]


def _corners(box: Floats, angle: float) -> Floats:
    """Return the corners (4, 2) of a box of centre and size that is rotated by an angle in radians, clockwise."""
    centre, (width, height) = box[:2], box[2:] / 2
    across = width * np.array([math.cos(angle), math.sin(angle)], np.float32)
    down = height * np.array([-math.sin(angle), math.cos(angle)], np.float32)
    return np.stack([centre + across + down, centre + across - down, centre - across - down, centre - across + down])


def mask_polygons(
    logits: Floats, box: tuple[float, float, float, float], view: _View, size: tuple[int, int]
) -> tuple[Points, ...]:
    """Return the outlines of an object's mask, cut off at its box, in pixels of the image.

    logits: (H, W) over the padded image of `size` (height, width); above 0 is the object.
    """
    left, top, right, bottom = (math.ceil(side) for side in box)
    if right <= left or bottom <= top:
        return ()
    # The middle of a pixel of the image, x + 0.5, lies at (x + 0.5) · scale + offset of the padded image.
    shrink = logits.shape[1] / size[1], logits.shape[0] / size[0]
    scale = [view.scale[axis] * shrink[axis] for axis in (0, 1)]
    start = [
        (first + 0.5) * scale[axis] + view.offset[axis] * shrink[axis] - 0.5 for axis, first in enumerate((left, top))
    ]
    matrix = np.array([[scale[0], 0, start[0]], [0, scale[1], start[1]]], np.float32)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    area = right - left, bottom - top
    inside = cv2.warpAffine(logits, matrix, area, flags=flags, borderMode=cv2.BORDER_REPLICATE) > 0
    mode = cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    lines, _ = cv2.findContours(inside.astype(np.uint8), *mode, offset=(left, top))
    return tuple(_as_points(line[:, 0]) for line in lines)


def _is_prototypes(output: Any) -> bool:
    """Return whether an output holds (batch, coefficients, height, width) of masks."""
    return output.type in FLOATS and len(output.shape) == 4 and isinstance(output.shape[1], int) and output.shape[1] > 0


def _is_image(source: Any) -> bool:
    """Return whether an input takes (batch, 3, height, width); sides without a number are dynamic."""
    shape = source.shape
    fits = len(shape) == 4 and shape[1] == 3 and all(side > 0 for side in shape if isinstance(side, int))
    return source.type in FLOATS and fits


def _session(path: Path, providers: Sequence[str] | None) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise DetectError(f"{path}: no such model file")
    usual = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors are raised, too
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=list(providers or usual))
    except Exception as e:
        raise DetectError(f"{path}: ONNX Runtime can't load it: {_first_line(e)}") from e


def _read_metadata(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Return the entries of METADATA. Raises DetectError for one that Ultralytics would not write."""
    entries: dict[str, str] = session.get_modelmeta().custom_metadata_map
    task = entries.get("task", "detect")
    if task not in TASKS:
        raise DetectError(f"its task is {task[:60]}, not one of {', '.join(TASKS)}")
    return {"task": task} | {
        key: _literal(key, entries[key], is_valid) if key in entries else default
        for key, (default, is_valid) in METADATA.items()
    }


def _literal(key: str, text: str, is_valid: Callable[[Any], bool]) -> Any:
    """Return the value of a Python literal; unlike eval, this runs no code."""
    try:
        value = ast.literal_eval(text[:MAX_METADATA])  # a dict that is cut off is no literal
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = None
    if not is_valid(value):
        raise DetectError(f"its metadata hold no valid {key}: {text[:60]}")
    return value


def _unicode(text: str) -> str:
    """Return text that UTF-8 can hold; a name on disk that is not UTF-8 is written with escapes such as \\udcff."""
    return text.encode("utf-8", "backslashreplace").decode()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def letterbox(
    image: Image, size: tuple[int, int], stride: int | None = None
) -> tuple[Image, tuple[float, float], tuple[int, int]]:
    """Scale an image to fit into `size` (height, width), and pad it with grey on all sides, centred.

    With `stride`, the sides are padded only to the next multiple of it. Returns the image, the scale (x, y) and the
    offset (x, y): a point x of the image is at `x * scale + offset` in the result.

    >>> letterbox(np.zeros((50, 100, 3), np.uint8), (64, 64))[0].shape
    (64, 64, 3)
    >>> letterbox(np.zeros((50, 100, 3), np.uint8), (128, 128), stride=32)[0].shape
    (64, 128, 3)
    """
    height, width = image.shape[:2]
    ratio = min(size[0] / height, size[1] / width)
    inner = [max(round(side * ratio), 1) for side in (width, height)]
    spare = [size[1] - inner[0], size[0] - inner[1]]
    if stride:
        spare = [side % stride for side in spare]
    left, top = (side // 2 for side in spare)
    if inner != [width, height]:
        image = cv2.resize(image, inner, interpolation=cv2.INTER_LINEAR)
    border = (top, spare[1] - top, left, spare[0] - left)
    padded = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=GREY)
    return padded, (inner[0] / width, inner[1] / height), (left, top)


def suppress(output: Floats, conf: float, iou: float, count: int | None = None, rotated: bool = False) -> Floats:
    """Run NMS within each class; return rows (n, 6 + own) of x1, y1, x2, y2, score, class, own numbers, best first.

    output: (4 + classes + own, anchors), with centre, size, scores of `count` classes (None: all that follow) and own
    numbers of each anchor. Only the best class of an anchor counts. Rotated boxes, whose own number is their angle,
    keep centre and size.
    """
    end = len(output) if count is None else 4 + count
    kept = output[4:end].max(0) > conf
    output = output[:, kept]
    classes, scores = output[4:end].argmax(0), output[4:end].max(0, initial=0)
    centre, size, own = output[:2].T, output[2:4].T, output[end:].T
    best: Sequence[int]
    if rotated:
        boxes = np.concatenate([centre, size], 1)
        best = _suppress_rotated(np.concatenate([boxes, own], 1).astype(np.float64), scores, classes, iou)
    else:
        corner = centre - size / 2
        boxes = np.concatenate([corner, corner + size], 1)
        sides = np.concatenate([corner, size], 1).tolist()
        best = cv2.dnn.NMSBoxesBatched(sides, scores.tolist(), classes.tolist(), conf, iou) if sides else ()
    rows = np.concatenate([boxes, scores[:, None], classes[:, None], own], 1)
    best_rows: Floats = rows[np.array(best, int).ravel()]
    return best_rows


def _suppress_rotated(boxes: Any, scores: Floats, classes: Any, iou: float) -> list[int]:
    """Return the indices of boxes (n, 5) that no better one of their class overlaps, best first, as Ultralytics does.

    There, a box that is itself dropped drops others, too.
    """
    order = np.argsort(-scores, kind="stable")
    boxes, classes = boxes[order], classes[order]
    kept = np.ones(len(order), bool)
    for number in range(len(order)):
        same = classes[number + 1 :] == classes[number]
        kept[number + 1 :] &= ~(same & (_rotated_iou(boxes[number], boxes[number + 1 :]) > iou))
    return [int(index) for index in order[kept]]


def _rotated_iou(box: Any, others: Any) -> Any:
    """Return how much rotated boxes (n, 5) overlap a box: the ProbIoU of https://arxiv.org/abs/2106.06072, in 0..1."""

    def covariance(x: Any) -> tuple[Any, Any, Any]:
        a, b = x[..., 2] ** 2 / 12, x[..., 3] ** 2 / 12
        cos, sin = np.cos(x[..., 4]), np.sin(x[..., 4])
        return a * cos**2 + b * sin**2, a * sin**2 + b * cos**2, (a - b) * cos * sin

    (a1, b1, c1), (a2, b2, c2) = covariance(box), covariance(others)
    a, b, c = a1 + a2, b1 + b2, c1 + c2
    x, y = box[0] - others[..., 0], box[1] - others[..., 1]
    determinant, tiny = a * b - c**2, 1e-7
    products = ((a1 * b1 - c1**2).clip(0) * (a2 * b2 - c2**2).clip(0)) ** 0.5
    distance = (a * y**2 + b * x**2 - 2 * c * x * y) / (determinant + tiny) / 4
    distance += np.log(determinant / (4 * products + tiny) + tiny) / 2
    return 1 - np.sqrt(1 - np.exp(-distance.clip(tiny, 100)) + tiny)


def draw(image: Image, detections: Sequence[Detection]) -> Image:
    """Return a copy of the image with boxes, names and scores drawn on it."""
    canvas: Image = image.copy()
    line = max(round(sum(image.shape[:2]) / 600), 1)
    for found in reversed(detections):
        x1, y1, x2, y2 = map(round, found.box)
        colour = _colour(found.class_id)
        label = f"{found.name[:60]} {found.score:.2f}"
        (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, line / 2.5, line)
        top = max(y1, height + 2 * line)
        if found.corners:
            cv2.polylines(canvas, [_pixels(found.corners)], True, colour, line)
        else:
            cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, line)
        if found.polygons:
            _fill(canvas, found, colour)
        for x, y, *_ in (point for point in found.keypoints or () if point[-1] > 0.5 or len(point) == 2):
            cv2.circle(canvas, (round(x), round(y)), 2 * line, colour, cv2.FILLED)
        cv2.rectangle(canvas, (x1, top - height - 2 * line), (x1 + width, top), colour, cv2.FILLED)
        cv2.putText(canvas, label, (x1, top - line), cv2.FONT_HERSHEY_SIMPLEX, line / 2.5, (255, 255, 255), line)
    return canvas


def _pixels(points: Points) -> Any:
    return np.rint(np.array(points)[:, :2]).astype(np.int32)


def _fill(canvas: Image, found: Detection, colour: tuple[int, int, int]) -> None:
    """Tint the pixels of a detection's mask."""
    x1, y1, x2, y2 = (math.ceil(side) for side in found.box)
    part = canvas[y1:y2, x1:x2]
    tinted = part.copy()
    cv2.fillPoly(tinted, [_pixels(polygon) - (x1, y1) for polygon in found.polygons or ()], colour)
    cv2.addWeighted(tinted, 0.4, part, 0.6, 0, dst=part)


def _colour(class_id: int) -> tuple[int, int, int]:
    # The golden ratio keeps the hues of neighbouring classes far apart, however many there are.
    hue = np.uint8([[[class_id * 0.618 % 1 * 180, 200, 190]]])  # type: ignore[arg-type]
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def read_image(path: Path) -> Image | None:
    """Read an image as (H, W, 3) BGR, turned as its EXIF orientation says; return None if it can't be read."""
    if not path.is_file():  # reading a pipe or a device may never end
        return None
    try:
        data = np.fromfile(path, np.uint8)  # unlike cv2.imread, works for any file name on any system
        image: Image | None = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, MemoryError, cv2.error):
        return None
    return image


def save_image(path: Path, image: Image) -> bool:
    """Write an image in the format of the file name's suffix; return whether OpenCV can write that format."""
    try:
        done, data = cv2.imencode(path.suffix, image)
    except cv2.error:  # no such encoder, or an image that is too large for the format
        done = False
    if done:
        data.tofile(path)
    return bool(done)


def find_images(source: Path) -> list[Path]:
    """Return the image `source`, or the images in the folder `source`, sorted by name.

    Raises DetectError if there are none.
    """
    if not source.exists():
        raise DetectError(f"{source}: no such file or folder")
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    images = [file for file in files if file.suffix.lower() in IMAGES]
    if not images:
        raise DetectError(f"{source}: no images here (of {' '.join(sorted(IMAGES))})")
    return images


def detect_images(detector: Detector, images: Sequence[Path], out: Path, conf: float, iou: float) -> list[Record]:
    """Write annotated copies of the images into `out`, and return a record of each image.

    Of several images, an unreadable one is reported and skipped. Raises DetectError if none is readable.
    """
    records: list[Record] = []
    for path in _progress(images, len(images)):
        image = read_image(path)
        if image is None and len(images) == 1:
            raise DetectError(f"{path}: unreadable image")
        if image is None:
            _report(f"{path}: unreadable image, skipped")
            continue
        found = detector(image, conf, iou)
        if not save_image(out / path.name, draw(image, found)):
            _report(f"{path}: OpenCV can't write such an image, so there is no annotated copy")
        records.append({"image": _unicode(str(path)), "detections": [each.record() for each in found]})
    if not records:
        raise DetectError("none of the images could be read")
    return records


def detect_video(detector: Detector, path: Path, out: Path, conf: float, iou: float) -> list[Record]:
    """Write an annotated copy of the video into `out` as .mp4, and return a record of each frame.

    Raises DetectError if no frame could be read.
    """
    records: list[Record] = []
    copy = out / f"{path.stem}.mp4"
    if _unicode(f"{path} {copy}") != f"{path} {copy}":  # OpenCV would crash
        raise DetectError(f"{path}: the name of a video and of its copy must be UTF-8")
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    rate = rate if 0 < rate < 1000 else 25.0  # broken files name impossible ones
    with _video_writer(copy, rate) as write:
        for number, frame in enumerate(_progress(_frames(capture), int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))):
            found = detector(frame, conf, iou)
            write(draw(frame, found))
            objects = [each.record() for each in found]
            records.append({"image": _unicode(str(path)), "frame": number, "detections": objects})
    if not records:
        raise DetectError(f"{path}: no frame of this video could be read")
    return records


def _frames(capture: cv2.VideoCapture) -> Iterator[Image]:
    try:
        while (result := capture.read())[0]:
            yield result[1]
    finally:
        capture.release()


@contextmanager
def _video_writer(path: Path, rate: float) -> Iterator[Any]:
    writer = cv2.VideoWriter()

    def write(frame: Image) -> None:
        height, width = frame.shape[:2]
        codec = cv2.VideoWriter.fourcc(*"mp4v")
        if not writer.isOpened() and not writer.open(str(path), codec, rate, (width, height)):
            raise DetectError(f"{path}: can't write a video here")
        writer.write(frame)

    try:
        yield write
    finally:
        writer.release()


def _progress(items: Iterable[T], total: int) -> Iterator[T]:
    """Yield the items, and print their count to stderr: on one line of a terminal, or every hundred in a log."""
    terminal = sys.stderr.isatty()
    for number, item in enumerate(items, 1):
        yield item
        if terminal or number % 100 == 0:
            print(f"\r{number}/{total}" if terminal else f"{number}/{total}", end="" if terminal else "\n",
                  file=sys.stderr, flush=True)  # fmt: skip
    if terminal:
        print(file=sys.stderr)


def save_json(path: Path, records: Sequence[Record]) -> None:
    """Write the records; a write that is cut off leaves an older file unchanged.

    A pipe or a device is written to, and so is what a link points to; they are not replaced by a file.
    """
    data = (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode()
    if path.is_symlink() or (path.exists() and not path.is_file()) or _is_stdout(path):
        with open(1 if _is_stdout(path) else path, "wb", closefd=not _is_stdout(path)) as file:
            file.write(data)
        return
    temporary = path.with_name(f".{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _identity(path: Path | int) -> tuple[int, int] | None:
    """Return what a file has in common with all links to it; None if it can't be found."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_stdout(path: Path) -> bool:
    return _identity(path) is not None and _identity(path) == _identity(1)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(description="Find objects with an ONNX file from `yolokd export`.")
    parser.add_argument("model", type=Path, help="the .onnx file")
    parser.add_argument("source", type=Path, help="an image, a folder of images, or a video")
    parser.add_argument("--conf", type=_fraction, default=0.25, help="least score of a detection (0.25)")
    parser.add_argument("--iou", type=_fraction, default=0.7, help="most overlap of two boxes of a class (0.7)")
    parser.add_argument("--imgsz", type=int, nargs="+", help="side, or height and width; for dynamic models")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/detect"), help="folder for annotated copies (runs/detect)"
    )
    parser.add_argument("--json", type=Path, help="file to write the detections to")
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DetectError(f"{message}; see --help")


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def _check_targets(args: argparse.Namespace, inputs: Sequence[Path], copies: Sequence[Path]) -> None:
    """Raise DetectError if a file to write is an input or a link to one, or if the JSON file is a folder."""
    home = args.source if args.source.is_dir() else args.source.parent
    if _identity(args.out) == _identity(home):
        raise DetectError(f"--out {args.out}: holds the source, which the annotated copies would replace")
    originals = {_identity(path) for path in inputs} - {None}
    for target in copies if args.json is None else (args.json, *copies):
        if _identity(target) in originals:
            raise DetectError(f"{target}: is an input, and would be overwritten")
    if args.json and args.json.is_dir():
        raise DetectError(f"--json {args.json}: is a folder")


def run(args: argparse.Namespace) -> None:
    """Detect, write the annotated copies and the JSON file, and print a summary."""
    is_video = args.source.is_file() and args.source.suffix.lower() in VIDEOS
    images = [] if is_video else find_images(args.source)
    names = [f"{args.source.stem}.mp4"] if is_video else [image.name for image in images]
    _check_targets(args, [args.model, args.source, *images], [args.out / name for name in names])
    detector = Detector(args.model, args.imgsz)
    for folder in (args.out, *([args.json.parent] if args.json else [])):
        folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    if is_video:
        records = detect_video(detector, args.source, args.out, args.conf, args.iou)
    else:
        records = detect_images(detector, images, args.out, args.conf, args.iou)
    pace = (time.perf_counter() - start) / len(records)
    if args.json:
        save_json(args.json, records)
    total = sum(len(record["detections"]) for record in records)
    kind = "frames" if is_video else "images"
    model = f"the model alone {statistics.median(detector.run_seconds) * 1000:.1f}"
    summary = f"{len(records)} {kind}, {total} detections, {pace * 1000:.1f} ms each ({model}); copies in {args.out}"
    print(_line(summary), file=sys.stderr if args.json and _is_stdout(args.json) else sys.stdout)


def _line(text: object) -> str:
    """Return text in one line; what a terminal can't show, or would obey, is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _report(text: object) -> None:
    print(_line(text), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it would say is reported by this file
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        run(_arguments(argv))
    except (DetectError, OSError, MemoryError, cv2.error) as e:
        _report(f"detect.py: {str(e).strip() or type(e).__name__}")
        return 2
    except KeyboardInterrupt:
        _report("detect.py: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
