"""Images whose names are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cv2
from ultralytics.utils.patches import imwrite

from yolokd.patches.patched import patched


@contextmanager
def any_image_name() -> Iterator[None]:
    """Let Ultralytics write images under any name inside the block.

    Replaces: `cv2.imwrite`.
    Why: OpenCV crashes the process for a name that is not UTF-8. Ultralytics has a function that writes images under
    any name, and uses it on Windows only.
    Unnecessary once: Ultralytics uses its function everywhere, or OpenCV takes any name.
    """
    with patched(cv2, "imwrite", imwrite):
        yield
