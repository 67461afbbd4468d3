"""The summaries of a comparison as tables (terminal, Markdown, CSV) and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, inf
from pathlib import Path
from statistics import fmean, stdev
from textwrap import fill
from typing import TYPE_CHECKING, Any

from rich.table import Table

from yolokd.commands.compare.ledger import LedgerRow
from yolokd.commands.compare.statistics import Interval, Summary
from yolokd.runtime import files
from yolokd.runtime.console import fit_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADERS = (
    "method", "seeds", "mAP50-95 (sd)", "mAP50", "AP small / medium / large", "difference (95 % interval)",
    "improved", "gap closed (95 % interval)", "verdict", "against native", "images/s of a run", "D_pred",
    "box mAP50-95",
)  # fmt: skip
NEWER = 2  # the last columns, which older ledgers lack
# The columns that a narrow terminal may lack, the most important first; all of them are in the files.
OPTIONAL = (
    "gap closed (95 % interval)", "against native", "seeds", "improved", "mAP50", "AP small / medium / large",
    "D_pred", "images/s of a run", "box mAP50-95",
)  # fmt: skip
BASELINE_COLOR = "black"
LEGEND_COLUMNS = 4
IN_FRONT = 5  # methods beside the baseline whose curves can be told apart in one plot


def summary_cells(summary: Summary) -> tuple[str, ...]:
    """Return one method's line of a table, in the order of HEADERS."""
    scores = _mean_scores(summary.rows)
    deviation = f" ({summary.deviation:.3f})" if summary.deviation is not None else ""
    return (
        summary.method,
        str(len(summary.rows)),
        _number(scores["map"]) + deviation,
        _number(scores["map50"]),
        _sizes(scores["ap_small"], scores["ap_medium"], scores["ap_large"]),
        str(summary.difference or ""),
        f"{summary.improved} of {summary.pairs}" if summary.pairs else "",
        percentage(summary.gap_closed),
        summary.verdict,
        str(summary.against_native or ""),
        f"{summary.images_per_second:.1f}",
        "" if summary.d_pred is None else f"{summary.d_pred:.2e}",
        _number(scores["box_map"]),
    )


def teacher_cells(teacher: LedgerRow) -> tuple[str, ...]:
    """Return a teacher's line of a table, in the order of HEADERS."""
    sizes = _sizes(teacher.ap_small, teacher.ap_medium, teacher.ap_large)
    return (
        f"teacher {teacher.teacher}",
        "",
        _number(teacher.map),
        _number(teacher.map50),
        sizes,
        *[""] * 7,
        _number(teacher.box_map),
    )


def _sizes(*values: float | None) -> str:
    return " / ".join(_number(v) or "–" for v in values)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def percentage(value: Interval | None) -> str:
    """Return a share with its interval, in percent; empty for None."""
    if value is None:
        return ""
    if value.low is None or value.high is None:
        return f"{value.mean:.0%} (no bounds)"
    return f"{value.mean:.0%} ({value.low:.0%} to {value.high:.0%})"


def terminal_table(lines: Sequence[tuple[str, ...]], width: int, metric: str = "box") -> Table:
    """Return lines in the order of HEADERS as a table for a terminal of `width` characters.

    metric: what the deciding mAP compares.
    """
    headers, *shown = _without_empty_columns([headers_of(metric), *lines])
    optional = [header for header in OPTIONAL if header in headers]
    return fit_table(headers, shown, width, optional, ("method", "verdict"), "the files below hold all columns")


def headers_of(metric: str) -> tuple[str, ...]:
    """Return HEADERS, with what the deciding mAP compares in its columns."""
    return tuple(deciding(metric) + h if h.startswith("mAP") else h for h in HEADERS)


def deciding(metric: str) -> str:
    """Return the prefix of `mAP50-95` in texts: empty for upright boxes, else what is compared, such as `mask `."""
    return "" if metric == "box" else f"{metric} "


def _without_empty_columns(lines: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return lines, headers first, without those of the last NEWER columns that are empty in every row."""
    old = len(lines[0]) - NEWER
    kept = [column for column in range(len(lines[0])) if column < old or any(line[column] for line in lines[1:])]
    return [tuple(line[column] for column in kept) for line in lines]


def markdown(lines: Sequence[tuple[str, ...]], title: str, metric: str = "box") -> str:
    """Return lines in the order of HEADERS as a Markdown table. metric: what the deciding mAP compares."""
    cells = (tuple(" ".join(cell.replace("|", "\\|").splitlines()) for cell in line) for line in lines)
    headers, *shown = _without_empty_columns([headers_of(metric), *cells])
    rows = [headers, tuple("---" for _ in headers), *shown]
    return f"{title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def write_csv(summaries: Sequence[Summary], teachers: Sequence[LedgerRow], path: Path) -> None:
    """Write summaries and teachers' scores as a CSV: one unrounded number in a cell; an empty cell if there is none."""
    lines: list[dict[str, object]] = [_csv_line(summary) for summary in summaries]
    lines += [{"method": f"teacher {teacher.teacher}", **_known_scores([teacher])} for teacher in teachers]
    files.write_csv(path, list(dict.fromkeys(key for line in lines for key in line)), lines)


def _csv_line(summary: Summary) -> dict[str, object]:
    return {
        "method": summary.method,
        "seeds": len(summary.rows),
        **_known_scores(summary.rows),
        "map_sd": summary.deviation,
        **_bounds("difference", summary.difference),
        "improved": summary.improved,
        "pairs": summary.pairs,
        **_bounds("share", summary.gap_closed),  # the column keeps the name that earlier releases gave it
        "verdict": summary.verdict,
        **_bounds("against_native", summary.against_native),
        "images_per_second": summary.images_per_second,
        **({} if summary.d_pred is None else {"d_pred": summary.d_pred}),
    }


def _mean_scores(rows: Sequence[LedgerRow]) -> dict[str, float | None]:
    """Return the mean of each score over the rows that have it."""
    columns = ("map", "map50", "ap_small", "ap_medium", "ap_large", "box_map", "box_map50")
    scores = {column: [v for row in rows if (v := getattr(row, column)) is not None] for column in columns}
    return {column: fmean(values) if values else None for column, values in scores.items()}


def _known_scores(rows: Sequence[LedgerRow]) -> dict[str, float | None]:
    """Return the mean scores; leave out box_map and box_map50 where they are None."""
    scores = _mean_scores(rows)
    return {name: score for name, score in scores.items() if score is not None or not name.startswith("box_")}


def _bounds(name: str, value: Interval | None) -> dict[str, float | None]:
    parts = (value.mean, value.low, value.high) if value is not None else (None, None, None)
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))


def draw_plot(figure: Figure, summaries: Sequence[Summary], teachers: Sequence[LedgerRow], title: str) -> None:
    """Draw mAP50-95 over epochs, and differences to the baseline with their intervals, the best method first.

    A method's curve has the color of its bar. The legend below names all curves.
    """
    ranked = sorted((s for s in summaries if not s.is_baseline), key=_mean_difference, reverse=True)
    label_lines = [_label(summary).count("\n") + 1 for summary in summaries]
    legend_rows = ceil((len(summaries) + len(teachers)) / LEGEND_COLUMNS)
    height = max(5, 2 + 0.15 * len(summaries) + 0.2 * sum(label_lines)) + 0.2 * legend_rows * max(label_lines)
    figure.set_size_inches(13, height)
    curves, bars = figure.subplots(1, 2)
    colors = _colors(ranked)
    _draw_curves(curves, summaries, ranked, teachers, colors)
    _draw_bars(bars, [summary for summary in ranked if summary.difference is not None], colors)
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, fontsize="small")
    figure.suptitle(fill(title, 120))


def _colors(ranked: Sequence[Summary]) -> dict[str, Any]:
    """Return {method: its color}."""
    from matplotlib import colormaps

    palette = colormaps["tab10" if len(ranked) < 10 else "tab20"]  # neighbours in tab20 are hard to tell apart
    hues = [hue for i in range(palette.N) if len({*(hue := palette(i))[:3]}) > 1]  # gray is too near the baseline's
    return {summary.method: hues[i % len(hues)] for i, summary in enumerate(ranked)}


def _label(summary: Summary) -> str:
    """Return a method's name and settings, wrapped so that the plots keep their width."""
    one_seed = summary.difference is not None and summary.difference.low is None
    return fill(summary.method, 32) + "\n(one seed)" * one_seed


def _mean_difference(summary: Summary) -> float:
    return summary.difference.mean if summary.difference is not None else -inf


def _scores_by_epoch(summary: Summary) -> list[tuple[float, ...]]:
    """Return, for each epoch, the scores of all seeds."""
    return list(zip(*(row.epochs for row in summary.rows), strict=False))


def _epoch_means(summary: Summary) -> list[float]:
    return [fmean(scores) for scores in _scores_by_epoch(summary)]


def _draw_curves(
    curves: Any,
    summaries: Sequence[Summary],
    ranked: Sequence[Summary],
    teachers: Sequence[LedgerRow],
    colors: dict[str, Any],
) -> None:
    """Draw all methods' curves: the baseline's above the others, and better methods' above worse ones'.

    Teachers' scores are dashed lines; not if they are those of another split than the curves'.
    """
    from matplotlib.ticker import MaxNLocator

    baseline = [summary for summary in summaries if summary.is_baseline]
    in_order = [*baseline, *ranked]  # of the legend
    for number, summary in enumerate(in_order):
        in_front = summary in (*ranked[:IN_FRONT], *baseline)
        _draw_curve(curves, summary, colors.get(summary.method, BASELINE_COLOR), in_front, zorder=3 - number / 1000)
    for teacher in teachers if teachers and teachers[0].split == "val" else ():
        curves.axhline(teacher.map, color="black", linestyle="--", linewidth=1, label=f"teacher {teacher.teacher}")
    # Methods differ late, and by little: the axis fits the second half of training, and cuts off the start.
    late = [mean for s in summaries for mean in _epoch_means(s)[len(_epoch_means(s)) // 2 :]]
    curves.set_ylim(bottom=min(late, default=None))
    curves.set_xlim(left=1)
    curves.xaxis.set_major_locator(MaxNLocator(integer=True))
    banded = f" (baseline and best {IN_FRONT})" if len(ranked) > IN_FRONT else ""
    curves.set_xlabel(f"epoch\nbands{banded}: one standard deviation over seeds")
    metric = deciding(next((row.metric for s in summaries for row in s.rows), "box"))
    curves.set_ylabel(f"{metric}mAP50-95 on the validation set")


def _draw_curve(curves: Any, summary: Summary, color: Any, in_front: bool, zorder: float) -> None:
    """Draw a method's curve; with a band of one standard deviation if it is in front."""
    means = _epoch_means(summary)
    epochs = range(1, len(means) + 1)
    width = 1.5 if in_front else 0.6
    curves.plot(epochs, means, color=color, label=_label(summary), linewidth=width, zorder=zorder)
    if not in_front:
        return
    deviations = [stdev(scores) if len(scores) > 1 else 0.0 for scores in _scores_by_epoch(summary)]
    low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
    curves.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)


def _draw_bars(bars: Any, summaries: Sequence[Summary], colors: dict[str, Any]) -> None:
    """Draw differences to the baseline; a hatched bar has one seed and therefore no interval."""
    for position, summary in enumerate(summaries):
        difference = summary.difference
        assert difference is not None
        error = None if difference.low is None else [[difference.mean - difference.low]] * 2
        hatch = "//" if error is None else None
        bars.barh(position, difference.mean, xerr=error, color=colors[summary.method], capsize=4, hatch=hatch)
    bars.set_yticks(range(len(summaries)), [_label(summary) for summary in summaries])
    bars.axvline(0, color="black", linewidth=1)
    bars.invert_yaxis()
    bars.locator_params(axis="x", nbins=6)
    bars.set(xlabel="difference of mAP50-95 to the baseline,\npaired by seed; 95 % interval")
