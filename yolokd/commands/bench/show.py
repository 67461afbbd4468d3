"""Shows the results of a benchmark as a table, a CSV file and a plot."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from yolokd.commands.bench.rounds import BenchRow


def make_table(rows: Sequence[BenchRow]) -> Table:
    """Return a table of the candidates of one setting."""
    first = rows[0]
    table = Table(
        "candidate", "amp", "threads", "s/step (min–max)", "images/s", "times as fast as native",
        "times as fast as native on all cores", "times the bound", "data", "teacher", "student", "methods", "peak MiB",
        title=f"{first.teacher}, {first.imgsz} px, batch {first.batch}: medians, in seconds per step",
    )  # fmt: skip
    for r in rows:
        table.add_row(
            r.contender, r.amp, str(r.threads), f"{r.step:.3f} ({r.fastest:.3f}–{r.slowest:.3f})",
            f"{r.images_per_second:.1f}", _format(r.times_native), _format(r.times_native_all_cores),
            _format(r.times_bound), f"{r.data:.3f}", f"{r.teacher_seconds:.3f}", f"{r.student:.3f}",
            f"{r.methods:.3f}", _format(r.peak_mib, 0),
        )  # fmt: skip
    return table


def _format(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """Write one line for each candidate of each setting."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)


def save_plot(rows: Sequence[BenchRow], path: Path) -> None:
    """Save stacked bars of the parts of a step's time, one panel for each teacher, image size and batch size."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r.teacher, r.imgsz, r.batch) for r in rows))
    figure = Figure(figsize=(6.5, 1 + 0.35 * len(rows) + 0.7 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        panel_rows = [r for r in rows if (r.teacher, r.imgsz, r.batch) == panel]
        labels = [r.contender + ("" if r.amp == "False" else f", amp={r.amp}") for r in panel_rows]
        left = [0.0] * len(panel_rows)
        for part, title in (("data", "data"), ("student", "student"), ("teacher_seconds", "teacher"),
                            ("methods", "methods")):  # fmt: skip
            widths = [getattr(r, part) for r in panel_rows]
            axes.barh(labels, widths, left=left, label=title)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="seconds per step", title="{}, {} px, batch {}".format(*panel))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
