"""Shows a deployment as a table and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from yolokd.commands.deploy.ledger import CHECKPOINT, NOT_SCORED, STUDENT, DeployRow
from yolokd.runtime.console import CONSOLE, fit_table, print_table, table_width
from yolokd.runtime.plots import new_plot

if TYPE_CHECKING:
    from pathlib import Path

    from yolokd.commands.deploy.places import Places

HEADERS = (
    "format", "MB", "mAP50-95", "difference", "worst class (AP)", "loses most", "p50 ms", "p95 ms", "peak MiB",
    "parity", "verdict",
)  # fmt: skip
# The columns that a narrow terminal may lack, the most important first.
OPTIONAL = ("p50 ms", "MB", "parity", "worst class (AP)", "p95 ms", "loses most", "peak MiB")
MARKERS = "osD^vP*Xph"


def verdict(row: DeployRow, limit: float | None) -> str:
    """Return what may be done with an export.

    `ok`; `differs` from its checkpoint; `refused` for a loss above the limit; `unscored` if it runs but was not scored;
    `skipped` if it was not made or does not run here.
    """
    if row.model != STUDENT or row.format == CHECKPOINT:
        return ""
    if row.parity == "FAIL":
        return "differs"
    if row.problem.startswith(NOT_SCORED):
        return "unscored"
    if row.problem or row.difference is None:
        return "skipped"
    return "refused" if limit is not None and row.difference < -limit else "ok"


def print_rows(rows: Sequence[DeployRow], limit: float | None, places: Places) -> bool:
    """Print the table, what was skipped, and where the files are; return whether no export is refused or differs."""
    verdicts = [verdict(row, limit) for row in rows]
    print_table(make_table(rows, verdicts, table_width()))
    first = rows[0]
    CONSOLE.print(
        f"scored on {first.images} images of {first.data} ({first.split}), {first.imgsz}x{first.imgsz} pixels; latency "
        f"of one image on {_threads(first)}, warm; memory of a process that runs nothing else"
    )
    for row in rows:
        if row.problem:
            CONSOLE.print(f"{row.name}: {row.problem}")
    bad = [row.name for row, word in zip(rows, verdicts, strict=True) if word in ("refused", "differs", "unscored")]
    if bad:
        allowed = "" if limit is None else f", lose more than limit={limit:g},"
        reasons = f"they differ from the checkpoint{allowed} or have no score"
        CONSOLE.print(f"not to be shipped, since {reasons}: {', '.join(bad)}")
    CONSOLE.print(places.csv, places.plot, places.exports, sep="\n")
    return not bad


def make_table(rows: Sequence[DeployRow], verdicts: Sequence[str], width: int) -> Table:
    """Return a table of at most `width` characters."""
    lines = [
        (
            row.name, _number(row.megabytes, 1), _number(row.map, 4), _signed(row.difference),
            _class(row.worst_class, _number(row.worst_ap, 3)), _class(row.most_lost_class, _signed(row.most_lost)),
            _number(row.p50_ms, 1), _number(row.p95_ms, 1), _number(row.peak_mib, 0), row.parity, word,
        )
        for row, word in zip(rows, verdicts, strict=True)
    ]  # fmt: skip
    return fit_table(HEADERS, lines, width, OPTIONAL, ("format",), "deploy.csv holds all columns")


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{round(value, 4) + 0.0:+.4f}"  # + 0.0 makes -0.0 positive


def _threads(row: DeployRow) -> str:
    return f"{row.threads} CPU thread{'s' * (row.threads > 1)}"


def _class(name: str, number: str) -> str:
    return f"{name} {number}" if name else ""


def save_plot(rows: Sequence[DeployRow], path: Path, limit: float | None) -> None:
    """Draw mAP50-95 over latency and over the size of the file, one marker for each format."""
    measured = [row for row in rows if row.map is not None]
    if not measured:
        return
    with new_plot(path) as figure:
        figure.set_size_inches(9, 4.5)
        over_latency, over_size = figure.subplots(1, 2, sharey=True)
        for number, row in enumerate(measured):
            style: dict[str, Any] = {"marker": MARKERS[number % len(MARKERS)], "linestyle": "none", "markersize": 8}
            assert row.p50_ms is not None
            assert row.p95_ms is not None
            tail = [[0.0], [row.p95_ms - row.p50_ms]]
            drawn = over_latency.errorbar([row.p50_ms], [row.map], xerr=tail, label=row.name, capsize=3, **style)
            over_size.plot([row.megabytes], [row.map], color=drawn.lines[0].get_color(), **style)
        if limit is not None and rows[0].map is not None:
            for axes in (over_latency, over_size):
                axes.axhline(rows[0].map - limit, color="black", linestyle=":", linewidth=1)
        first = measured[0]
        over_latency.set(
            xlabel=f"ms for an image, {_threads(first)}: median, and 95 % below the bar", ylabel="mAP50-95"
        )
        over_size.set(xlabel="size of the file in MB")
        for axes in (over_latency, over_size):
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
        figure.suptitle(f"{first.file} on {first.data} ({first.split}), {first.imgsz} pixels")
        figure.legend(*over_latency.get_legend_handles_labels(), loc="outside lower center", ncols=4)
