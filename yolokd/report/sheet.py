"""The maps of one image as a PNG: a row for each level, the image beside its maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from yolokd.report.pictures import Layer, MapGroup, layers
from yolokd.report.seen.maps import LevelMaps
from yolokd.report.seen.samples import Frame, Sample
from yolokd.runtime.plots import new_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES = 2.3  # of the longer side of each picture


def draw_sheet(
    sample: Sample, size: int, maps: LevelMaps, shares: Mapping[str, float], groups: Sequence[MapGroup], path: Path
) -> None:
    """Draw an image and its maps at each level, and save them as a PNG.

    size: the side of the models' square in pixels. maps: of this image alone. shares: of the teacher's confidence, by
    level. Raises UserError if the file cannot be written.
    """
    rows = {level: [(g, layer) for g in groups for layer in layers(g, maps, {}, level, 0)] for level in maps}
    columns = 1 + max(map(len, rows.values()))
    frame = sample.frame(size)
    scale = INCHES / max(frame.width, frame.height)
    with new_plot(path) as figure:
        figure.set_size_inches(columns * (frame.width * scale + 0.1), len(rows) * (frame.height * scale + 0.45))
        axes = figure.subplots(len(rows), columns, squeeze=False)
        for (level, drawn), row in zip(rows.items(), axes, strict=True):
            for cell in row:
                cell.set_axis_off()
            share = f", {shares[level]:.0%} of confidence" if level in shares else ""
            _draw_photo(row[0], sample, f"{level}{share}")
            for (group, layer), cell in zip(drawn, row[1:], strict=False):
                _draw_map(cell, layer, frame, f"{group.method}: {layer.heading}" if group.method else layer.heading)


def _draw_photo(axes: Axes, sample: Sample, title: str) -> None:
    image = sample.image[..., ::-1] if sample.image.shape[2] == 3 else sample.image[..., 0]
    axes.imshow(image, cmap="gray", interpolation="antialiased")
    axes.set_title(title, fontsize=7)


def _draw_map(axes: Axes, layer: Layer, frame: Frame, title: str) -> None:
    square = (0, frame.size, frame.size, 0)
    values = layer.values
    axes.imshow(values, layer.colors, vmin=layer.low, vmax=layer.high, extent=square, interpolation="nearest")
    axes.set_xlim(frame.left, frame.left + frame.width)
    axes.set_ylim(frame.top + frame.height, frame.top)
    axes.set_title(f"{title}\n{layer.number}", fontsize=7)
