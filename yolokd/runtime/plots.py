"""Plots that are drawn and saved as PNG files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from yolokd.runtime.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


@contextmanager
def new_plot(path: Path) -> Iterator[Figure]:
    """Yield an empty figure to draw on, and save it as a PNG when the block ends.

    Text appears as it is: a `$` in the name of a file or a class starts no formula.
    Raises UserError if the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):
        figure = Figure(layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png")
