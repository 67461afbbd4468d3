"""Shows the results of a benchmark as a table, a CSV file and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import fill

from rich.table import Table

from yolokd.commands.bench.rounds import BenchRow
from yolokd.runtime import files
from yolokd.runtime.console import fit_table
from yolokd.runtime.plots import new_plot

HEADERS = (
    "candidate", "amp", "threads", "s/step (min–max)", "images/s", "times as fast as native",
    "times as fast as native on all cores", "times the bound", "data", "teacher", "student", "methods", "peak MiB",
)  # fmt: skip
# The columns that a narrow terminal may lack, the most important first.
OPTIONAL = (
    "times as fast as native", "times the bound", "teacher", "student", "methods", "data", "peak MiB",
    "times as fast as native on all cores", "threads",
)  # fmt: skip
PARTS = {"data": "data", "student": "student", "teacher_seconds": "teacher", "methods": "methods"}


def make_table(rows: Sequence[BenchRow], width: int) -> Table:
    """Return a table, of at most `width` characters, of the candidates of one setting."""
    lines = [
        (
            r.candidate, r.amp, str(r.threads), f"{r.step:.3f} ({r.fastest:.3f}–{r.slowest:.3f})",
            f"{r.images_per_second:.1f}", _format(r.times_native), _format(r.times_native_all_cores),
            _format(r.times_bound), f"{r.data:.3f}", f"{r.teacher_seconds:.3f}", f"{r.student:.3f}",
            f"{r.methods:.3f}", _format(r.peak_mib, 0),
        )
        for r in rows
    ]  # fmt: skip
    return fit_table(HEADERS, lines, width, OPTIONAL, ("candidate",), "bench.csv holds all columns")


def _format(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """Write one line for each candidate of each setting."""
    lines = [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows]
    files.write_csv(path, list(lines[0]), lines)


def save_plot(rows: Sequence[BenchRow], path: Path, warning: str = "") -> None:
    """Save stacked bars of the parts of a step's time, one panel for each teacher, image size and batch size.

    warning: a sentence above the panels.
    """
    panels = list(dict.fromkeys((r.teacher, r.imgsz, r.batch) for r in rows))
    with new_plot(path) as figure:
        figure.set_size_inches(6.5, 1.8 + 0.35 * len(rows) + 0.7 * len(panels))
        all_axes = figure.subplots(len(panels), squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            panel_rows = [r for r in rows if (r.teacher, r.imgsz, r.batch) == panel]
            left = [0.0] * len(panel_rows)
            for part, label in PARTS.items():
                widths = [getattr(r, part) for r in panel_rows]
                axes.barh(range(len(panel_rows)), widths, left=left, label=label)
                left = [a + b for a, b in zip(left, widths, strict=True)]
            labels = [r.candidate + ("" if r.amp == "False" else f", amp={r.amp}") for r in panel_rows]
            axes.set_yticks(range(len(panel_rows)), labels)
            axes.invert_yaxis()
            axes.set(xlabel="seconds per step", title="{}, {} px, batch {}".format(*panel))
        figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS))
        if warning:
            figure.suptitle(fill(f"WARNING: {warning}", 70), color="red", fontsize="medium")
