"""The labels of drawn shapes, for each task: lines of a YOLO label file, without the class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import cv2
import numpy as np
import numpy.typing as npt

Points = npt.NDArray[np.float64]  # (n, 2) x, y, as fractions of the image's side
Mask = npt.NDArray[np.bool_]

_FINE = 4  # outlines are traced on a grid this many times as fine as the image: their error is an eighth of a pixel
_TOLERANCE = 0.35  # in pixels: how far a simplified outline may lie from the traced one


class LabelKind(NamedTuple):
    """One kind of labels.

    describe: returns the numbers of a label, from the visible pixels and the four corners of an object. entries: what
    the data set's .yaml must say beside paths and names.
    """

    describe: Callable[[Mask, Points], npt.NDArray[np.float64]]
    entries: Mapping[str, object] = MappingProxyType({})


def box(visible: Mask, _corners: Points) -> npt.NDArray[np.float64]:
    """Return centre and size of the box around the visible pixels."""
    x, y, w, h = cv2.boundingRect(visible.astype(np.uint8))
    return np.array([x + w / 2, y + h / 2, w, h]) / len(visible)


def outline(visible: Mask, _corners: Points) -> npt.NDArray[np.float64]:
    """Return the outline of the visible pixels as one polygon.

    Holes and separate parts are joined to it where they are nearest, by lines there and back that enclose nothing.
    """
    line, *others = _contours(visible)
    for other in others:
        distances = np.hypot(*(line[:, None] - other).transpose(2, 0, 1))
        i, j = np.unravel_index(distances.argmin(), distances.shape)
        loop = np.roll(other, -j, 0)
        line = np.concatenate([line[: i + 1], loop, loop[:1], line[i:]])
    return line.ravel()


def rotated_box(visible: Mask, _corners: Points) -> npt.NDArray[np.float64]:
    """Return the corners of the smallest rectangle around the visible pixels, cut off at the image's edges."""
    points = np.concatenate(_contours(visible)).astype(np.float32)
    return np.asarray(cv2.boxPoints(cv2.minAreaRect(points)), np.float64).clip(0, 1).ravel()


def box_and_keypoints(visible: Mask, corners: Points) -> npt.NDArray[np.float64]:
    """Return the box, then x, y and visibility of each corner: 2, or 0 if it lies outside of the image."""
    inside = ((corners >= 0) & (corners <= 1)).all(1, keepdims=True)
    return np.concatenate([box(visible, corners), np.hstack([corners * inside, 2.0 * inside]).ravel()])


def _contours(visible: Mask) -> list[Points]:
    """Return the closed lines around the visible pixels, the longest first."""
    fine = visible.repeat(_FINE, 0).repeat(_FINE, 1).astype(np.uint8)
    found, _ = cv2.findContours(fine, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    simple = [cv2.approxPolyDP(line, _TOLERANCE * _FINE, closed=True) for line in sorted(found, key=len, reverse=True)]
    return [(line[:, 0] + 0.5) / len(fine) for line in simple]


# By the name of the data set, as in `data=shapes-seg`.
SHAPE_SETS: Mapping[str, LabelKind] = MappingProxyType(
    {
        "shapes": LabelKind(box),
        "shapes-seg": LabelKind(outline),
        "shapes-pose": LabelKind(box_and_keypoints, {"kpt_shape": [4, 3], "flip_idx": [1, 0, 3, 2]}),
        "shapes-obb": LabelKind(rotated_box),
    }
)
