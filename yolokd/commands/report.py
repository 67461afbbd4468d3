"""`yolokd report`: makes the report of a run or of a comparison again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ultralytics.utils.torch_utils import select_device

from yolokd.commands.candidates import PLAIN
from yolokd.commands.compare.ledger import TEACHER, read
from yolokd.commands.compare.show import deciding, draw_plot, headers_of, percentage
from yolokd.commands.compare.statistics import Summary
from yolokd.commands.compare.verdicts import Verdict, verdicts
from yolokd.config.arguments import check_known
from yolokd.errors import UserError
from yolokd.report.facts import Table
from yolokd.report.page import render, write_page
from yolokd.report.plots import Plot, as_svg
from yolokd.report.run_report import write_report
from yolokd.runtime.console import CONSOLE
from yolokd.runtime.files import check_output_folder
from yolokd.runtime.threads import use_all_cores
from yolokd.training.settings import check_device, with_absolute_paths
from yolokd.version import __version__

KEYS = ("run", "csv", "teacher", "data", "device", "trust")


def run_report(**keys: Any) -> Path:
    """Write report.html into the folder `run`, or an HTML file beside a comparison's `csv`; print and return its path.

    teacher, data: files of the run that have moved. device: where the models look at the images. trust: as in a
    training. Raises UserError for what cannot work.
    """
    check_known(keys, KEYS, f"one of: {', '.join(KEYS)}")
    run, csv = keys.get("run"), keys.get("csv")
    if (run is None) == (csv is None):
        raise UserError("run, csv", "give one of the two", "for example run=runs/distill/train")
    if csv is not None:
        for key in (key for key in keys if key != "csv"):
            raise UserError(key, "works with run=, not with csv=", "drop it")
    path = _report_run(Path(str(run)), keys) if run is not None else _report_comparison(Path(str(csv)))
    CONSOLE.print(path)
    return path


def _report_run(folder: Path, keys: dict[str, Any]) -> Path:
    if folder.is_file():
        raise UserError(f"run={folder}", "is a file", "give the run's folder")
    check_output_folder(folder, "run")
    device = select_device(check_device(keys.get("device")), verbose=False)
    use_all_cores(device)
    given: dict[str, Any] = {key: keys[key] for key in ("teacher", "data", "trust") if key in keys}
    return write_report(folder, with_absolute_paths(given), device)


def _report_comparison(csv: Path) -> Path:
    rows = list(read(csv).values())
    if all(row.method == TEACHER for row in rows):
        problem = "holds no runs" if csv.exists() else "no such file"
        raise UserError(f"csv={csv}", problem, "give a CSV that `yolokd compare` wrote")
    grounds = [
        {
            "title": verdict.title,
            "sentence": result_sentence(verdict),
            "plot": _plot(verdict),
            "table": Table("", headers_of(verdict.metric), verdict.lines),
        }
        for verdict in verdicts(rows)
    ]
    content = {"title": f"comparison {csv.stem}", "grounds": grounds, "csv": csv.name, "version": __version__}
    return write_page(render("compare.html.jinja", content), csv.with_suffix(".html"))


def _plot(verdict: Verdict) -> Plot:
    svg = as_svg(lambda figure: draw_plot(figure, verdict.summaries, verdict.teachers, ""))
    text = "Left: the score over the epochs, the mean of all seeds. Right: the difference to the baseline; a bar whose "
    return Plot("Scores", text + "interval holds 0 shows no clear difference.", svg)


def result_sentence(verdict: Verdict) -> str:
    """Return the result of a comparison in one sentence: its best method against the baseline."""
    baseline = next((summary for summary in verdict.summaries if summary.is_baseline), None)
    others = [summary for summary in verdict.summaries if summary.difference is not None]
    if baseline is None or not others:
        return "There is nothing to compare yet: a baseline and a method with common seeds are needed."
    best = max(others, key=_mean_difference)
    seeds = f"{best.pairs} common seed{'s' if best.pairs != 1 else ''}"
    against = "plain training" if baseline.method == PLAIN else baseline.method
    difference = f"{best.difference} against {against}, over {seeds}"
    text = f"Best of {len(others)} methods: " if len(others) > 1 else ""
    text += f"{best.method} changes {deciding(verdict.metric)}mAP50-95 by {difference}: {best.verdict}"
    gap = best.gap_closed
    if gap is not None and gap.excludes_zero and gap.mean > 0:
        text += f"; it closes {percentage(gap)} of the gap to the teacher"
    return f"{text}."


def _mean_difference(summary: Summary) -> float:
    assert summary.difference is not None
    return summary.difference.mean
