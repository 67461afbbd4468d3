"""Curves of a run over its epochs, as SVG that takes the colors of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, nan
from statistics import fmean
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from yolokd.config.schema import DistillationConfig
from yolokd.models.tasks import Task
from yolokd.report.history import History
from yolokd.runtime.plots import import_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # a color that stands for the page's text, which is light or dark
COLORS = ("#3d85c6", "#e07b39", "#2e9e6b", "#9c6ade", "#d1477a", "#8a8f2a")  # readable on white and on black
SIZE = (4.6, 2.9)  # of a plot, in inches
STYLE: dict[Any, Any] = {
    "text.parse_math": False, "text.usetex": False, "svg.fonttype": "none", "svg.hashsalt": "yolokd",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": INK, "grid.alpha": 0.12,
    "axes.linewidth": 0.6, "font.size": 9, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.6,
}  # fmt: skip
LOSSES = {"box_loss": "boxes", "cls_loss": "classes", "dfl_loss": "box distances"}


@dataclass(frozen=True)
class Plot:
    """A plot with its title and a sentence that says how to read it."""

    title: str
    caption: str
    svg: Markup


def as_svg(draw: Callable[[Figure], None], size: tuple[float, float] = SIZE) -> Markup:
    """Return what a function draws on an empty figure as SVG, without a background, whose text has the page's color.

    Text appears as it is, and names of classes or files start no formula. Black becomes the page's color, too.
    """
    import_matplotlib()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = target.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(rf"{INK}|#000000\b|(?<=stroke: )black\b", "currentColor", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return Markup(re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 class="plot" role="img"', svg, count=1))


@contextmanager
def _axes(figure: Figure, label: str) -> Any:
    from matplotlib.ticker import MaxNLocator

    axes = figure.subplots()
    yield axes
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        axes.legend()


def _line(axes: Axes, history: History, values: Sequence[float], **style: Any) -> None:
    """Draw a curve over the epochs; a single epoch as a dot."""
    axes.plot(history.epochs, values, marker="o" if len(history.epochs) < 2 else None, markersize=4, **style)


def score_plot(history: History, teacher_score: float | None, task: Task) -> Plot | None:
    """Return the curves of the mAP that decides, or None if no epoch was scored. task: the student's."""
    scores, scores50 = (history.column(task.score_column(name)) for name in ("mAP50-95", "mAP50"))
    best = history.best_epoch(task.score_column("mAP50-95"))
    if best is None:
        return None

    def draw(figure: Figure) -> None:
        with _axes(figure, "mAP on the validation set") as axes:
            _line(axes, history, scores, color=COLORS[0], label=f"student, {task.score_name}", linewidth=2)
            _line(axes, history, scores50, color=COLORS[0], label="student, mAP50", alpha=0.55)
            axes.plot(best, scores[history.epochs.index(best)], "o", color=COLORS[0], markersize=5)
            if teacher_score is not None:
                axes.axhline(teacher_score, color=COLORS[1], linestyle="--", label=f"teacher, {task.score_name}")
            axes.set_ylim(bottom=0)

    caption = f"Higher is better. The dot marks the highest score, at epoch {best:g}."
    return Plot("Score", caption, as_svg(draw, (5.2, 3.0)))


def loss_plots(history: History, methods: Sequence[str]) -> list[Plot]:
    """Return a plot for each loss, of the training and, where it has one, of the validation.

    methods: the names of the run's methods, whose losses are not those of YOLO.
    """
    of_methods = {f"{method}_loss" for method in methods}
    names = [name.removeprefix("train/") for name in history.columns if name.startswith("train/")]
    plots = []
    for name in (name for name in names if name.endswith("_loss") and _has_values(history.column(f"train/{name}"))):
        validated = _has_values(history.column(f"val/{name}"))

        def draw(figure: Figure, name: str = name, validated: bool = validated) -> None:
            with _axes(figure, "loss") as axes:
                _line(axes, history, history.column(f"train/{name}"), color=COLORS[0], label="training")
                if validated:
                    _line(axes, history, history.column(f"val/{name}"), color=COLORS[1], label="validation")

        short = LOSSES.get(name, name.removesuffix("_loss"))
        if name in of_methods:
            title, caption = f"Distillation loss: {short}", "Before its gain. Good: it falls."
        else:
            title, caption = f"YOLO loss: {short}", "Good: both fall. If only the training's falls, it overfits."
        plots.append(Plot(title, caption, as_svg(draw)))
    return plots


def balance_plots(history: History, config: DistillationConfig, epochs: int) -> list[Plot]:
    """Return plots of each method's gradient and gain by level. epochs: of the whole training."""
    levels = list(dict.fromkeys(name.split("/")[1] for name in history.columns if name.startswith("level/")))
    colors = dict(zip(levels, COLORS[1:], strict=False))
    plots = []
    for number, method in enumerate(config.method_configs):
        ratios = {level: history.column(f"level/{level}/{method.name}_ratio") for level in levels}
        if not any(map(_has_values, ratios.values())):
            continue

        def draw_ratios(figure: Figure, ratios: Mapping[str, list[float]] = ratios, number: int = number) -> None:
            with _axes(figure, "gradient, YOLO loss = 1") as axes:
                for level, values in ratios.items():
                    _line(axes, history, values, color=colors[level], label=level)
                _line(axes, history, _means(ratios.values()), color=INK, label="mean of the levels", linewidth=2)
                if config.balance != "off":
                    factors = [config.factors(epoch - 0.5, epochs)[number] for epoch in history.epochs]
                    target = [config.balance * factor for factor in factors]
                    _line(axes, history, target, color=INK, label="target", linestyle=":", linewidth=1.2)
                axes.set_ylim(bottom=0)

        def draw_gains(figure: Figure, name: str = method.name) -> None:
            with _axes(figure, "gain") as axes:
                for level in levels:
                    gains = history.column(f"level/{level}/{name}_gain")
                    _line(axes, history, gains, color=colors[level], label=level)
                axes.set_ylim(bottom=0)

        balanced = "Balanced gains: the mean follows the dotted target, whatever the losses do. "
        reading = "How hard the method pulls at each level of the student's neck, beside the YOLO loss. "
        levels_say = "A level that stays at 0 while others do not is one where the teacher sees nothing."
        text = reading + (balanced if config.balance != "off" else "The gains are fixed. ") + levels_say
        plots.append(Plot(f"Pull of {method.name}", text, as_svg(draw_ratios)))
        text = "What the method's loss is multiplied by, so that the pull follows its target."
        if config.balance == "off":
            text = "What the method's loss is multiplied by: the fixed gain, times its schedule."
        plots.append(Plot(f"Gains of {method.name}", text, as_svg(draw_gains)))
    return plots


def share_plot(history: History) -> Plot | None:
    """Return the teacher's confidence by level over the epochs, or None if it was not measured."""
    levels = [name.split("/")[1] for name in history.columns if name.startswith("level/") and name.endswith("/share")]
    shares = {level: history.column(f"level/{level}/share") for level in levels}
    if not any(map(_has_values, shares.values())):
        return None

    def draw(figure: Figure) -> None:
        with _axes(figure, "share of the teacher's confidence") as axes:
            for color, (level, values) in zip(COLORS[1:], shares.items(), strict=False):
                _line(axes, history, values, color=color, label=level)
            axes.set_ylim(0, 1)

    caption = "The teacher's confidence at each level. level_weights and level_floor say how it weights the levels."
    return Plot("Where the teacher sees objects", caption, as_svg(draw))


def _means(columns: Iterable[Sequence[float]]) -> list[float]:
    """Return the mean in each epoch over the columns that have a value there."""
    finite = ([value for value in values if isfinite(value)] for values in zip(*columns, strict=True))
    return [fmean(values) if values else nan for values in finite]


def _has_values(values: Sequence[float]) -> bool:
    return any(isfinite(value) for value in values)
