"""`data=shapes`: a small data set that is drawn, not downloaded; `shapes-seg`, …: with labels for other tasks.

Each image is seeded by (seed, split, number) only. Shapes are placed from front to back, and a shape is left out of
the image if too little of it would be visible. So every drawn shape of a class is labelled, and its box is tight to
its visible pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt
import platformdirs
import yaml
from rich.console import Console
from rich.progress import track

from yolokd.data.shape_labels import SHAPE_SETS, Points
from yolokd.errors import UserError

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Outline = npt.NDArray[np.complex128]  # the corners of a closed line, as x + iy

CLASSES = ("disc", "ring", "triangle", "square", "star", "cross")
COUNTS: Mapping[str, int] = MappingProxyType({"train": 480, "val": 120, "test": 120})
SIZE = 128

_VERSION = 2  # part of the folder's name: raise it whenever the images change
_FINE = 4  # outlines are filled on a grid this many times as fine as the image, for soft edges
_MIN_VISIBLE = 0.6  # the least fraction of a shape that must be visible
_DISTRACTORS = ("blob", "bar")  # drawn, but not labelled


def ensure(seed: int = 0, root: Path | None = None, counts: Mapping[str, int] = COUNTS, name: str = "shapes") -> Path:
    """Return the path of the data set's data.yaml; draw the set on first use, into the user's data folder or `root`.

    counts: {split: number of images}. name: of the kind of labels, one of shape_labels.SHAPE_SETS.
    Raises UserError for a negative seed, and OSError if the folder can't be written.

    >>> import tempfile
    >>> ensure(seed=1, root=Path(tempfile.mkdtemp()), counts={"train": 2, "val": 1}).name
    'data.yaml'
    """
    if seed < 0:
        raise UserError(f"seed={seed}", "must not be negative", "try seed=0")
    root = root or platformdirs.user_data_path("yolokd")
    sizes = [] if counts == COUNTS else [f"{split}{count}" for split, count in counts.items()]
    folder = root / "-".join([name, str(seed), f"v{_VERSION}", *sizes])
    if not (folder / "data.yaml").exists():
        root.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=root, prefix=f".{folder.name}-") as temporary:
            _publish(_generate(Path(temporary) / folder.name, seed, counts, name), folder)
    return folder / "data.yaml"


def _publish(drawn: Path, folder: Path) -> None:
    """Move the complete data set to its final folder, unless another process has put it there meanwhile."""
    try:
        os.rename(drawn, folder)
    except OSError:  # the other process's set is the same as ours
        if not (folder / "data.yaml").exists():
            raise


def _generate(folder: Path, seed: int, counts: Mapping[str, int], name: str = "shapes") -> Path:
    """Draw the images, write them with their labels and the data.yaml into a folder, and return it."""
    for kind in ("images", "labels"):
        for split in counts:
            (folder / kind / split).mkdir(parents=True)
    jobs = [(split, number) for split, count in counts.items() for number in range(count)]
    for split, number in track(jobs, f"Drawing the data set {name}", console=Console(stderr=True), transient=True):
        # Seeded by the split's name, not its position: a set without `test` has the same training images.
        rng = np.random.default_rng([seed, *split.encode(), number])
        jpeg, labels = _draw_image(rng, name)
        (folder / "images" / split / f"{number:04}.jpg").write_bytes(jpeg)
        (folder / "labels" / split / f"{number:04}.txt").write_bytes(labels.encode())
    # No `path`: Ultralytics then looks for the splits beside this file.
    paths = {split: f"images/{split}" for split in counts}
    description = {**paths, "names": dict(enumerate(CLASSES)), **SHAPE_SETS[name].entries}
    (folder / "data.yaml").write_bytes(yaml.safe_dump(description, sort_keys=False).encode())
    return folder


class _Shape(NamedTuple):
    name: str
    cover: Array  # the fraction of each pixel that the shape covers, in 0..1
    visible: Mask  # its pixels that no nearer shape hides
    centre: complex  # x + iy, in pixels
    radius: float  # in pixels
    corners: Outline  # of the box around it as it was before it was turned, from its upper left one, clockwise


def _draw_image(rng: np.random.Generator, name: str = "shapes") -> tuple[bytes, str]:
    """Draw one image; return it as a JPEG, with its labels as the text of a YOLO label file. name: of their kind."""
    placed = list(_scene(rng))
    light = np.exp(1j * rng.uniform(0, 2 * np.pi))
    image = _surface(rng, _colour(rng), contrast=0.2)
    for shape in reversed(placed):
        image = _paint(rng, image, shape, light)
    labels = "".join(_label(shape, name) for shape in placed if shape.name in CLASSES)
    return _photograph(rng, image, light), labels


def _scene(rng: np.random.Generator) -> Iterator[_Shape]:
    """Place shapes of random classes, sizes and positions, from front to back; skip those that are mostly hidden."""
    names = [*rng.choice(CLASSES, rng.integers(1, 8)), *rng.choice(_DISTRACTORS, rng.integers(0, 3))]
    hidden = np.zeros((SIZE, SIZE), bool)
    for name in map(str, rng.permutation(names)):
        radius = SIZE * np.exp(rng.uniform(np.log(0.09), np.log(0.25)))
        centre = complex(*rng.uniform(0.6 * radius, SIZE - 0.6 * radius, 2))
        turn, tilt = np.exp(1j * rng.uniform(-0.25, 0.25, 2))
        squeeze = rng.uniform(0.75, 1)
        outlines = _outlines(rng, name)
        *lines, corners = (
            _squeeze(line * tilt, squeeze) * turn * radius + centre for line in [*outlines, _corners(outlines)]
        )
        cover = _fill(lines)
        covered = cover >= 0.5
        visible = covered & ~hidden
        if visible.sum() >= _MIN_VISIBLE * covered.sum():
            hidden |= covered
            yield _Shape(name, cover, visible, centre, radius, corners)


def _label(shape: _Shape, kind: str) -> str:
    """Return a shape's line of a YOLO label file: class, and numbers in 0..1. kind: the name of a kind of labels."""
    corners: Points = np.stack([shape.corners.real, shape.corners.imag], 1) / SIZE
    values = SHAPE_SETS[kind].describe(shape.visible, corners)
    return " ".join([str(CLASSES.index(shape.name)), *(f"{value:.6f}" for value in values)]) + "\n"


def _corners(lines: list[Outline]) -> Outline:
    """Return the corners of the upright box around outlines, from the upper left one, clockwise."""
    points = np.concatenate(lines)
    left, right, top, bottom = points.real.min(), points.real.max(), points.imag.min(), points.imag.max()
    return np.array([left + 1j * top, right + 1j * top, right + 1j * bottom, left + 1j * bottom])


def _outlines(rng: np.random.Generator, name: str) -> list[Outline]:
    """Return the outlines of a shape, in the unit circle; the area inside two outlines is a hole."""
    circle = np.ones(48)
    square = _polar(np.ones(4)) * np.exp(0.25j * np.pi)
    match name:
        case "disc":
            return [_polar(circle)]
        case "ring":
            return [_polar(circle), _polar(circle * rng.uniform(0.5, 0.7))]
        case "triangle":
            return [_polar(np.ones(3)) * -1j]
        case "square":
            return [square]
        case "star":
            return [_polar(np.tile([1, rng.uniform(0.4, 0.55)], 5)) * -1j]
        case "cross":
            arm = rng.uniform(0.25, 0.4)
            quarter = np.array([1 - arm * 1j, 1 + arm * 1j, arm + arm * 1j])
            return [np.concatenate([quarter * 1j**turn for turn in range(4)])]
        case "bar":
            return [_squeeze(square, rng.uniform(0.2, 0.35)) * np.exp(1j * rng.uniform(0, np.pi))]
        case _:  # a blob
            return [_polar(np.interp(np.arange(48) / 48 * 7, range(8), np.resize(rng.uniform(0.4, 1, 7), 8)))]


def _polar(radii: npt.NDArray[np.float64]) -> Outline:
    """Return an outline whose corners have these radii, at equal angles."""
    corners: Outline = radii * np.exp(2j * np.pi * np.arange(len(radii)) / len(radii))
    return corners


def _squeeze(line: Outline, factor: float) -> Outline:
    """Scale an outline's height by a factor."""
    return line.real + 1j * factor * line.imag


def _fill(lines: list[Outline]) -> Array:
    """Return the fraction of each pixel, (SIZE, SIZE) in 0..1, that the outlines enclose."""
    fine = np.zeros((SIZE * _FINE, SIZE * _FINE), np.float32)
    bits = 4  # OpenCV takes coordinates as integers with this many fractional bits
    corners = [np.stack([line.real, line.imag], 1) * _FINE * 2**bits for line in lines]
    cv2.fillPoly(fine, [np.rint(points).astype(np.int32) for points in corners], 1.0, shift=bits)
    cover: Array = cv2.resize(fine, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return cover


def _noise(rng: np.random.Generator) -> Array:
    """Return (SIZE, SIZE) noise of five octaves, scaled to 0..1."""
    total = np.zeros((SIZE, SIZE), np.float32)
    for octave in range(1, 6):
        coarse = rng.random((2**octave, 2**octave), np.float32)
        total += cv2.resize(coarse, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC) / octave
    lowest, highest = total.min(), total.max()
    return np.asarray((total - lowest) / (highest - lowest), np.float32)


def _colour(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return a random colour between grey and saturated, three values in 0..1."""
    grey, tint = rng.uniform(0.15, 0.85), rng.uniform(0.1, 0.9, 3)
    return grey + (tint - grey) * rng.uniform(0, 1)


def _surface(rng: np.random.Generator, colour: npt.NDArray[np.float64], contrast: float) -> Array:
    """Return a textured surface (SIZE, SIZE, 3) of a colour; a quarter of the surfaces have stripes."""
    grain = _noise(rng)
    if rng.random() < 0.25:
        rows, columns = np.mgrid[:SIZE, :SIZE] * rng.uniform(-1, 1, (2, 1, 1))
        grain = (grain + np.sin(rows + columns)) / 2
    swing = rng.normal(0, contrast) + rng.normal(0, contrast, 3)
    return np.asarray(colour + (grain[..., None] - 0.5) * swing, np.float32)


def _slope(centre: complex, radius: float, light: complex) -> Array:
    """Return how far each pixel lies from the centre towards the light, in radii."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    towards = (columns - centre.real) * light.real + (rows - centre.imag) * light.imag
    return np.asarray(towards / radius, np.float32)


def _paint(rng: np.random.Generator, image: Array, shape: _Shape, light: complex) -> Array:
    """Return the image with a shaded shape and its shadow on it."""
    skin = _surface(rng, _colour(rng), contrast=0.12)
    skin = skin * (1 + rng.uniform(0, 0.35) * _slope(shape.centre, shape.radius, light))[..., None]
    away = -light * shape.radius * rng.uniform(0.05, 0.25)
    move = np.array([[1, 0, away.real], [0, 1, away.imag]])
    shadow = cv2.GaussianBlur(cv2.warpAffine(shape.cover, move, (SIZE, SIZE)), (0, 0), 1 + 0.08 * shape.radius)
    ground: Array = image * (1 - rng.uniform(0.2, 0.6) * shadow)[..., None]
    return ground + (skin - ground) * shape.cover[..., None]


def _photograph(rng: np.random.Generator, image: Array, light: complex) -> bytes:
    """Return the scene as a JPEG of a cheap camera: uneven light, blur, noise and compression artefacts."""
    lit = image * (1 + rng.uniform(0, 0.35) * _slope(complex(SIZE, SIZE) / 2, SIZE / 2, light))[..., None]
    soft = cv2.GaussianBlur(lit, (0, 0), rng.uniform(0.3, 1))
    noisy = soft * rng.uniform(0.7, 1.2) + rng.normal(0, rng.uniform(0.01, 0.04), image.shape)
    pixels = np.rint(np.clip(noisy, 0, 1) * 255).astype(np.uint8)
    ok, jpeg = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(50, 95))])
    assert ok, "OpenCV can always write a JPEG into memory"
    return bytes(jpeg)
