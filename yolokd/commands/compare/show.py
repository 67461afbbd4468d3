"""A comparison as tables for terminal, Markdown and CSV, and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure
from rich.table import Table

from yolokd.commands.compare.ledger import LedgerRow
from yolokd.commands.compare.statistics import Interval, Summary

HEADERS = (
    "method", "seeds", "mAP50-95 (sd)", "mAP50", "AP small / medium / large", "difference (95 % interval)",
    "improved", "gap closed (95 % interval)", "verdict", "against native", "images/s of a run",
)  # fmt: skip
BASELINE_COLOR = "black"
IN_FRONT = 5  # methods beside the baseline whose curves can be told apart in one plot


def cells(found: Summary) -> tuple[str, ...]:
    """One method as words, in the order of HEADERS."""
    scores = _scores(found.rows)
    deviation = f" ({found.deviation:.3f})" if found.deviation is not None else ""
    return (
        found.method,
        str(len(found.rows)),
        _number(scores["map"]) + deviation,
        _number(scores["map50"]),
        _sizes(scores["ap_small"], scores["ap_medium"], scores["ap_large"]),
        str(found.difference or ""),
        f"{found.improved} of {found.pairs}" if found.pairs else "",
        _percent(found.share),
        found.verdict,
        str(found.against_native or ""),
        f"{found.images_per_second:.1f}",
    )


def teacher_cells(teacher: LedgerRow) -> tuple[str, ...]:
    """A teacher's own scores, in the order of HEADERS."""
    sizes = _sizes(teacher.ap_small, teacher.ap_medium, teacher.ap_large)
    return (f"teacher {teacher.teacher}", "", _number(teacher.map), _number(teacher.map50), sizes, *[""] * 6)


def _sizes(*values: float | None) -> str:
    return " / ".join(_number(v) or "–" for v in values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _percent(share: Interval | None) -> str:
    if share is None:
        return ""
    if share.low is None or share.high is None:
        return f"{share.mean:.0%} (no bounds)"
    return f"{share.mean:.0%} ({share.low:.0%} to {share.high:.0%})"


def terminal(lines: Sequence[tuple[str, ...]], title: str) -> Table:
    """For people at a terminal."""
    table = Table(title=title)
    for header in HEADERS:
        table.add_column(header, no_wrap=header == "verdict")
    for line in lines:
        table.add_row(*line)
    return table


def markdown(lines: Sequence[tuple[str, ...]], title: str) -> str:
    """For a README."""
    rows = [HEADERS, tuple("---" for _ in HEADERS), *lines]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_csv(found: Sequence[Summary], teachers: Sequence[LedgerRow], path: Path) -> None:
    """For a spreadsheet: a number to a cell, in full; empty where there is none."""
    lines: list[dict[str, object]] = [_figures(summary) for summary in found]
    lines += [{"method": f"teacher {teacher.teacher}", **_scores([teacher])} for teacher in teachers]
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)


def _figures(found: Summary) -> dict[str, object]:
    return {
        "method": found.method,
        "seeds": len(found.rows),
        **_scores(found.rows),
        "map_sd": found.deviation,
        **_bounds("difference", found.difference),
        "improved": found.improved,
        "pairs": found.pairs,
        **_bounds("share", found.share),
        "verdict": found.verdict,
        **_bounds("against_native", found.against_native),
        "images_per_second": found.images_per_second,
    }


def _scores(rows: Sequence[LedgerRow]) -> dict[str, float | None]:
    """Means over the seeds that have the score."""
    names = ("map", "map50", "ap_small", "ap_medium", "ap_large")
    known = {name: [v for row in rows if (v := getattr(row, name)) is not None] for name in names}
    return {name: fmean(values) if values else None for name, values in known.items()}


def _bounds(name: str, value: Interval | None) -> dict[str, float | None]:
    parts = (value.mean, value.low, value.high) if value is not None else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))


def picture(found: Sequence[Summary], teachers: Sequence[LedgerRow], title: str) -> Figure:
    """mAP50-95 over epochs, and differences with their intervals, best first: a curve has the color of its bar."""
    lines = sum(_label(summary).count("\n") + 1 for summary in found)
    figure = Figure(figsize=(13, max(5, 2 + 0.15 * len(found) + 0.2 * lines)), layout="constrained")
    curves, bars = figure.subplots(1, 2)
    ranked = sorted((s for s in found if not s.is_baseline), key=_gained, reverse=True)
    palette = colormaps["tab10" if len(ranked) < 10 else "tab20"]  # tab20's neighbours are hard to tell apart
    hues = [hue for i in range(palette.N) if len({*(hue := palette(i))[:3]}) > 1]  # gray is too near the baseline's
    colors: dict[str, Any] = {s.method: hues[i % len(hues)] for i, s in enumerate(ranked)}
    baseline = [summary for summary in found if summary.is_baseline]
    for summary in [*reversed(ranked), *baseline]:  # the baseline above the rest, and the best above others
        in_front = summary in (*ranked[:IN_FRONT], *baseline)
        _draw_curve(curves, summary, colors.get(summary.method, BASELINE_COLOR), in_front)
    for summary in ranked:
        if summary.difference is not None:
            _draw_bar(bars, summary, summary.difference, colors[summary.method])
    for teacher in teachers if teachers and teachers[0].split == "val" else ():
        curves.axhline(teacher.map, color="black", linestyle="--", linewidth=1, label=f"teacher {teacher.teacher}")
    # Methods differ late, by little: the scale is that of the second half, and the first comes in from below.
    curves.set_ylim(bottom=min(mean for s in found for mean in _means(s)[len(_means(s)) // 2 :]))
    curves.set_xlim(left=1)
    banded = f" (baseline and best {IN_FRONT})" if len(ranked) > IN_FRONT else ""
    curves.set_xlabel(f"epoch\nbands{banded}: one standard deviation over seeds")
    curves.set_ylabel("mAP50-95 on the validation set")
    curves.legend()
    bars.axvline(0, color="black", linewidth=1)
    bars.invert_yaxis()
    bars.locator_params(axis="x", nbins=6)
    bars.set(xlabel="difference of mAP50-95 to the baseline,\npaired by seed; 95 % interval")
    figure.suptitle(fill(title, 120))
    return figure


def _label(summary: Summary) -> str:
    """A method's name, with the settings that tell it apart: narrow enough to leave the plots their place."""
    alone = summary.difference is not None and summary.difference.low is None
    return fill(summary.method, 32) + "\n(one seed)" * alone


def _gained(summary: Summary) -> float:
    return summary.difference.mean if summary.difference is not None else -inf


def _by_epoch(summary: Summary) -> list[tuple[float, ...]]:
    """Each epoch's scores, over seeds."""
    return list(zip(*(row.epochs for row in summary.rows), strict=False))


def _means(summary: Summary) -> list[float]:
    return [fmean(scores) for scores in _by_epoch(summary)]


def _draw_curve(curves: Any, summary: Summary, color: Any, in_front: bool) -> None:
    """A line over epochs, named where no bar names its color; one in front with a band of one standard deviation."""
    means = _means(summary)
    at = range(1, len(means) + 1)
    label = _label(summary) if summary.difference is None else None
    curves.plot(at, means, color=color, label=label, linewidth=1.5 if in_front else 0.6)
    if not in_front:
        return
    spread = [stdev(e) if len(e) > 1 else 0.0 for e in _by_epoch(summary)]
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    curves.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)


def _draw_bar(bars: Any, summary: Summary, difference: Interval, color: Any) -> None:
    """The difference to the baseline; hatched where one seed gives no interval."""
    error = None if difference.low is None else [[difference.mean - difference.low]] * 2
    hatch = "//" if error is None else None
    bars.barh(_label(summary), difference.mean, xerr=error, color=color, capsize=4, hatch=hatch)
