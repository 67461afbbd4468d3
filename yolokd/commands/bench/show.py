"""A benchmark as table, CSV and picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from yolokd.commands.bench.rounds import BenchRow


def table(rows: Sequence[BenchRow]) -> Table:
    """The contenders of one setting."""
    first = rows[0]
    found = Table(
        "contender", "amp", "threads", "s/step (min–max)", "images/s", "times native", "times native, all cores",
        "of the bound", "data", "teacher", "student", "methods", "peak MiB",
        title=f"{first.teacher}, {first.imgsz} px, batch {first.batch}: medians",
    )  # fmt: skip
    for r in rows:
        found.add_row(
            r.contender, r.amp, str(r.threads), f"{r.step:.3f} ({r.fastest:.3f}–{r.slowest:.3f})",
            f"{r.images_per_second:.1f}", _number(r.times_native), _number(r.times_native_all_cores),
            _number(r.times_bound), f"{r.data:.3f}", f"{r.teacher_seconds:.3f}", f"{r.student:.3f}",
            f"{r.methods:.3f}", _number(r.peak_mib, 0),
        )  # fmt: skip
    return found


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_csv(rows: Sequence[BenchRow], path: Path) -> None:
    """One line for each contender of each setting."""
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in rows)


def draw(rows: Sequence[BenchRow], path: Path) -> None:
    """Stacked bars of where a step's time goes, one panel for each teacher, image size and batch."""
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys((r.teacher, r.imgsz, r.batch) for r in rows))
    figure = Figure(figsize=(6.5, 1 + 0.35 * len(rows) + 0.7 * len(panels)), layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
        shown = [r for r in rows if (r.teacher, r.imgsz, r.batch) == panel]
        labels = [r.contender + ("" if r.amp == "False" else f", amp={r.amp}") for r in shown]
        left = [0.0] * len(shown)
        for part, title in (("data", "data"), ("student", "student"), ("teacher_seconds", "teacher"),
                            ("methods", "methods")):  # fmt: skip
            widths = [getattr(r, part) for r in shown]
            axes.barh(labels, widths, left=left, label=title)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="seconds per step", title="{}, {} px, batch {}".format(*panel))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
