"""A picture of some labelled images with their boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

from yolokd.commands.label.labelled_set import LabelledImage
from yolokd.data.dataset import Image, read_image, spread
from yolokd.runtime.plots import new_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLE = 16  # ours: the number of images in the picture
INCHES = 3.0  # of each image's width and height


def draw_sample(images: Sequence[LabelledImage], names: Mapping[int, str], channels: int, path: Path) -> None:
    """Draw up to SAMPLE images, evenly spread, with their boxes and the names of their classes, and save them as a PNG.

    Raises UserError if the file cannot be written.
    """
    sample = spread(images, SAMPLE)
    columns = ceil(sqrt(len(sample)))
    rows = ceil(len(sample) / columns)
    with new_plot(path) as figure:
        figure.set_size_inches(INCHES * columns, INCHES * rows)
        for i, labelled in enumerate(sample):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.set_axis_off()
            axes.set_title(labelled.image.name.encode(errors="replace").decode(), fontsize=6)
            if (image := read_image(labelled.image, channels)) is not None:
                _draw(axes, image, labelled.boxes, names)


def _draw(axes: Axes, image: Image, boxes: Sequence[tuple[int, list[float]]], names: Mapping[int, str]) -> None:
    from matplotlib.patches import Rectangle

    height, width, channels = image.shape
    axes.imshow(image[..., ::-1] if channels == 3 else image[..., 0], cmap="gray")
    for label, (x, y, w, h) in boxes:
        color, left, top = f"C{label % 10}", (x - w / 2) * width, (y - h / 2) * height
        axes.add_patch(Rectangle((left, top), w * width, h * height, fill=False, color=color, linewidth=0.8))
        axes.text(left, top, names[label], color=color, fontsize=5, verticalalignment="bottom", clip_on=True)
