#!/usr/bin/env python3
"""Find objects in images or a video with an ONNX file from `yolokd export`.

This file needs numpy, OpenCV and onnxruntime, and no other file:

    python detect.py best.onnx photo.jpg --json found.json

Or from Python:

    detector = Detector("best.onnx")
    for found in detector(cv2.imread("photo.jpg")):
        print(found.name, found.score, found.box)
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import onnxruntime

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Record = dict[str, Any]
T = TypeVar("T")

IMAGES = {".avif", ".bmp", ".jp2", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
VIDEOS = {".asf", ".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
GREY = (114, 114, 114)  # the network was trained with images padded in this grey


class DetectError(ValueError):
    """A mistake in what the user gave, as a message of one line; the command line exits with status 2."""


@dataclass(frozen=True)
class Detection:
    """One object: its class, its score in 0..1, and its box (x1, y1, x2, y2) in pixels of the image."""

    class_id: int
    name: str
    score: float
    box: tuple[float, float, float, float]

    def record(self) -> Record:
        """Return the detection as a dict that JSON can hold."""
        box = [round(side, 3) for side in self.box]
        return {"class": self.class_id, "name": self.name, "score": round(self.score, 6), "box": box}


class Detector:
    """An ONNX detector, called with one image at a time.

    imgsz: the side, or (height, width), that images are scaled to. The default is the exported size; only a dynamic
    model takes another one. providers: ONNX Runtime's execution providers; the default is CUDA if it is installed,
    else the CPU.
    Raises DetectError if the file is missing, is not a detector, or can't run at `imgsz`.
    """

    def __init__(
        self,
        path: str | Path,
        imgsz: int | Sequence[int] | None = None,
        providers: Sequence[str] | None = None,
    ) -> None:
        self.session = _session(Path(path), providers)
        source, output = self.session.get_inputs()[0], self.session.get_outputs()[0]
        meta = self.session.get_modelmeta().custom_metadata_map
        self.names: dict[int, str] = _literal(meta, "names", {})
        self.stride: int = _literal(meta, "stride", 32)
        # With an end-to-end head or an embedded NMS, the output is final rows of x1, y1, x2, y2, score, class.
        chosen = _literal(meta, "end2end", False) or _literal(meta, "args", {}).get("nms") is True
        self.final: bool = chosen or output.shape[-1:] == [6]
        if len(source.shape) != 4 or source.shape[1] != 3 or len(output.shape) != 3 or not self._fits(output.shape):
            raise DetectError(f"{path}: not a YOLO detector: input {source.shape}, output {output.shape}")
        self.input = source.name
        self.dtype = np.float16 if "float16" in source.type else np.float32
        self.batch = source.shape[0] if isinstance(source.shape[0], int) else 1
        self.dynamic = not all(isinstance(side, int) for side in source.shape[2:])
        own = _literal(meta, "imgsz", [640, 640]) if self.dynamic else source.shape[2:]
        self.size = self._choose_size(own if imgsz is None else imgsz, own)

    def _fits(self, output: Sequence[int | str]) -> bool:
        # In some dynamic files, the sides of the output have names instead of numbers.
        expected, fields = (6, output[2]) if self.final else (4 + len(self.names), output[1])
        return fields == expected or isinstance(fields, str)

    def _choose_size(self, asked: int | Sequence[int], own: Sequence[int]) -> tuple[int, int]:
        sides = [asked] if isinstance(asked, int) else list(asked)
        if len(sides) not in (1, 2) or min(sides) < 1:
            raise DetectError(f"imgsz={asked}: give one positive side, or height and width")
        height, width = (math.ceil(side / self.stride) * self.stride for side in (sides * 2)[:2])
        if not self.dynamic and [height, width] != list(own):
            raise DetectError(f"imgsz={asked}: this model runs at {own[0]}x{own[1]} only (export it with dynamic=True)")
        return height, width

    def __call__(self, image: Image, conf: float = 0.25, iou: float = 0.7, max_det: int = 300) -> list[Detection]:
        """Return the objects in an image (H, W, 3; BGR, uint8) that score above `conf`, best first.

        A box that overlaps a better box of its class by more than `iou` is dropped, unless the model chooses its boxes
        itself (end-to-end, or exported with nms=True). Raises DetectError for an image of another shape or type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DetectError(f"an image must be (H, W, 3) uint8 in BGR order, not {image.shape} {image.dtype}")
        # Like Ultralytics' predictor: for a dynamic model, pad only to the next multiple of the stride.
        padded, scale, offset = letterbox(image, self.size, self.stride if self.dynamic else None)
        output = self._run(padded)
        rows = output[output[:, 4] > conf] if self.final else suppress(output, conf, iou)
        rows = rows[:max_det]
        height, width = image.shape[:2]
        boxes = (rows[:, :4] - np.tile(offset, 2)) / np.tile(scale, 2)
        boxes = boxes.clip(0, np.array([width, height, width, height]))
        return [self._detection(row, box) for row, box in zip(rows, boxes, strict=True)]

    def _run(self, padded: Image) -> Floats:
        """Run the model on a padded image (H, W, 3); return (4 + classes, anchors), or final rows (n, 6)."""
        tensor = padded[None, ..., ::-1].transpose(0, 3, 1, 2).astype(np.float32) / 255
        tensor = np.repeat(tensor.astype(self.dtype), self.batch, axis=0)
        try:
            output: Floats = self.session.run(None, {self.input: tensor})[0][0].astype(np.float32)
        except Exception as e:  # ONNX Runtime's errors have no common class
            size = "x".join(map(str, padded.shape[:2]))
            raise DetectError(f"the model does not run at {size}: {_first_line(e)}; try another imgsz") from e
        return output

    def _detection(self, row: Floats, box: Floats) -> Detection:
        class_id = int(row[5])
        x1, y1, x2, y2 = map(float, box)
        return Detection(class_id, self.names.get(class_id, str(class_id)), float(row[4]), (x1, y1, x2, y2))


def _session(path: Path, providers: Sequence[str] | None) -> onnxruntime.InferenceSession:
    if not path.is_file():
        raise DetectError(f"{path}: no such model file")
    usual = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(str(path), providers=list(providers or usual))
    except Exception as e:
        raise DetectError(f"{path}: ONNX Runtime can't load it: {_first_line(e)}") from e


def _literal(meta: dict[str, str], key: str, default: Any) -> Any:
    try:
        return ast.literal_eval(meta[key]) if key in meta else default
    except (ValueError, SyntaxError) as e:
        raise DetectError(f"the model's metadata holds no readable {key}: {meta[key][:60]}") from e


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


def suppress(output: Floats, conf: float, iou: float) -> Floats:
    """Run NMS within each class; return rows (n, 6) of x1, y1, x2, y2, score, class, best first.

    output: (4 + classes, anchors), with centre, size and class scores of each anchor. Only the best class of an anchor
    counts.
    """
    classes, scores = output[4:].argmax(0), output[4:].max(0)
    kept = scores > conf
    classes, scores = classes[kept], scores[kept]
    centre, size = output[:2, kept].T, output[2:4, kept].T
    corner = centre - size / 2
    boxes = np.concatenate([corner, size], 1)
    best = cv2.dnn.NMSBoxesBatched(boxes.tolist(), scores.tolist(), classes.tolist(), conf, iou) if len(boxes) else ()
    rows = np.concatenate([corner, corner + size, scores[:, None], classes[:, None]], 1)
    best_rows: Floats = rows[np.array(best, int).ravel()]
    return best_rows


def draw(image: Image, detections: Sequence[Detection]) -> Image:
    """Return a copy of the image with boxes, names and scores drawn on it."""
    canvas: Image = image.copy()
    line = max(round(sum(image.shape[:2]) / 600), 1)
    for found in reversed(detections):
        x1, y1, x2, y2 = map(round, found.box)
        colour = _colour(found.class_id)
        label = f"{found.name} {found.score:.2f}"
        (width, height), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, line / 2.5, line)
        top = max(y1, height + 2 * line)
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, line)
        cv2.rectangle(canvas, (x1, top - height - 2 * line), (x1 + width, top), colour, cv2.FILLED)
        cv2.putText(canvas, label, (x1, top - line), cv2.FONT_HERSHEY_SIMPLEX, line / 2.5, (255, 255, 255), line)
    return canvas


def _colour(class_id: int) -> tuple[int, int, int]:
    # The golden ratio keeps the hues of neighbouring classes far apart, however many there are.
    hue = np.uint8([[[class_id * 0.618 % 1 * 180, 200, 190]]])  # type: ignore[arg-type]
    blue, green, red = cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].tolist()
    return blue, green, red


def read_image(path: Path) -> Image | None:
    """Read an image as (H, W, 3) BGR, turned as its EXIF orientation says; return None if it can't be read."""
    try:
        data = np.fromfile(path, np.uint8)  # unlike cv2.imread, works for any file name on any system
        image: Image | None = cv2.imdecode(data, cv2.IMREAD_COLOR) if data.size else None
    except (OSError, cv2.error):
        return None
    return image


def save_image(path: Path, image: Image) -> None:
    """Write an image in the format of the file name's suffix."""
    done, data = cv2.imencode(path.suffix, image)
    if not done:
        raise DetectError(f"{path}: can't write this kind of image")
    data.tofile(path)


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

    An unreadable image is reported and skipped. Raises DetectError if none is readable.
    """
    records = []
    for path in _progress(images, len(images)):
        image = read_image(path)
        if image is None:
            print(f"{path}: unreadable image, skipped", file=sys.stderr)
            continue
        found = detector(image, conf, iou)
        save_image(out / path.name, draw(image, found))
        records.append({"image": str(path), "detections": [each.record() for each in found]})
    if not records:
        raise DetectError("none of the images could be read")
    return records


def detect_video(detector: Detector, path: Path, out: Path, conf: float, iou: float) -> list[Record]:
    """Write an annotated copy of the video into `out` as .mp4, and return a record of each frame.

    Raises DetectError if no frame could be read.
    """
    records = []
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS) or 25.0
    with _video_writer(out / f"{path.stem}.mp4", rate) as write:
        for number, frame in enumerate(_progress(_frames(capture), int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))):
            found = detector(frame, conf, iou)
            write(draw(frame, found))
            records.append({"image": str(path), "frame": number, "detections": [each.record() for each in found]})
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
    """Write the records; a write that is cut off leaves an older file unchanged."""
    temporary = path.with_name(f".{path.name}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(records, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Find objects with an ONNX file from `yolokd export`.")
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


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def run(args: argparse.Namespace) -> None:
    """Detect, write the annotated copies and the JSON file, and print a summary."""
    is_video = args.source.is_file() and args.source.suffix.lower() in VIDEOS
    images = [] if is_video else find_images(args.source)
    home = args.source if args.source.is_dir() else args.source.parent
    if args.out.resolve() == home.resolve():
        raise DetectError(f"--out {args.out}: holds the source, which the annotated copies would replace")
    detector = Detector(args.model, args.imgsz)
    args.out.mkdir(parents=True, exist_ok=True)
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
    print(f"{len(records)} {kind}, {total} detections, {pace * 1000:.1f} ms each; annotated copies in {args.out}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    try:
        run(_arguments(argv))
    except (DetectError, OSError) as e:
        print(f"detect.py: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
