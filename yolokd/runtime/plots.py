"""Plots that are drawn and saved as PNG files."""

from __future__ import annotations

import os
import sys
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

    Text appears as it is: a `$` in the name of a file or a class starts no formula, and LaTeX is not used.
    Raises UserError if the file cannot be written.
    """
    import_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = Figure(layout="constrained")
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=DPI, format="png")


def import_matplotlib() -> None:
    """Import matplotlib without the settings in the working folder, which may be a stranger's.

    matplotlib looks for a `matplotlibrc` there first. Such a file can make plots run LaTeX, which can write files, and
    matplotlib evaluates some of its values.
    """
    if "matplotlib" in sys.modules or not os.path.isfile("matplotlibrc"):
        return
    working_folder = os.getcwd()
    os.chdir(os.sep)
    try:
        import matplotlib  # noqa: F401
    finally:
        os.chdir(working_folder)
