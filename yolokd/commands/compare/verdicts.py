"""The verdict of a comparison: tables and a plot for each ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolokd.commands.candidates import NATIVE, PLAIN
from yolokd.commands.compare import show
from yolokd.commands.compare.grounds import (
    by_ground,
    comparable_disagreements,
    mixed_versions,
    name_configurations,
    teachers_of,
)
from yolokd.commands.compare.ledger import TEACHER, LedgerRow
from yolokd.commands.compare.statistics import Summary, summarize
from yolokd.runtime.console import CONSOLE, print_table, table_width
from yolokd.runtime.files import atomic_path
from yolokd.runtime.plots import new_plot


def report(compared: Sequence[LedgerRow], ledger: Sequence[LedgerRow], methods: Sequence[str], path: Path) -> None:
    """Print the verdict on the rows of one comparison, and write the verdict on their whole ground.

    compared: the comparison's rows. ledger: all rows of the ledger at `path`, beside which the files are written.
    methods: those of the comparison; the baseline is `none`, or the first one if `none` has no row.
    """
    rows = [row for row in compared if row.method != TEACHER]
    if not rows:
        return
    _print(_make_verdict(rows, ledger, methods))
    grounds, ground = by_ground(ledger), rows[0].ground
    _write(_make_verdict(grounds[ground], ledger, methods), _base_path(path, list(grounds).index(ground)))


def report_all(ledger: Sequence[LedgerRow], path: Path) -> None:
    """Print and write the verdict on each ground of the ledger at `path`.

    The baseline is `none`, or a ground's first method.
    """
    for number, verdict in enumerate(verdicts(ledger)):
        _print(verdict)
        _write(verdict, _base_path(path, number))


def verdicts(ledger: Sequence[LedgerRow]) -> list[Verdict]:
    """Return the verdict on each ground of a ledger; the baseline is `none`, or a ground's first method."""
    return [_make_verdict(rows, ledger, [row.method for row in rows]) for rows in by_ground(ledger).values()]


@dataclass(frozen=True)
class Verdict:
    """The summaries of some rows of one ground, the rows of their teachers, and a title."""

    title: str
    summaries: Sequence[Summary]
    teachers: Sequence[LedgerRow]

    @property
    def metric(self) -> str:
        """Return what the deciding mAP compares, which is the same for all rows of a ground."""
        return self.summaries[0].rows[0].metric

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """Return the lines of a table, in the columns of `show.HEADERS`."""
        teachers = [show.teacher_cells(row) for row in self.teachers]
        return [*(show.summary_cells(summary) for summary in self.summaries), *teachers]


def _base_path(path: Path, number: int) -> Path:
    """Return the path of a ground's files without their endings; `number` keeps those of several grounds apart."""
    return path.with_name(path.stem if number == 0 else f"{path.stem}-{number + 1}")


def _make_verdict(rows: Sequence[LedgerRow], ledger: Sequence[LedgerRow], methods: Sequence[str]) -> Verdict:
    common, named = name_configurations(comparable_disagreements(rows))
    names: dict[str, list[str]] = {}  # method: the names of its configurations
    for row, named_row in zip(rows, named, strict=True):
        names.setdefault(row.method, []).append(named_row.method)
    baseline = next((names[method][0] for method in (PLAIN, methods[0]) if method in names), None)
    natives = set(names.get(NATIVE, ()))
    native = natives.pop() if len(natives) == 1 else None
    first = rows[0]
    title = f"{first.student} on {first.data} (ground {first.ground[:6]}), scored on {first.split}: {common}"
    if versions := mixed_versions(rows):
        title += f"; rows of different versions: {versions}"
    teachers = teachers_of(rows, ledger)
    return Verdict(title, summarize(named, baseline, native, teachers), teachers)


def _print(verdict: Verdict) -> None:
    CONSOLE.print(verdict.title)
    print_table(show.terminal_table(verdict.lines, table_width(), verdict.metric))


def _write(verdict: Verdict, base: Path) -> None:
    """Write a verdict's Markdown table, CSV and plot, and print their paths."""
    text = show.markdown(verdict.lines, verdict.title, verdict.metric)
    with atomic_path(base.with_name(f"{base.name}-summary.md")) as path:
        path.write_text(text, encoding="utf-8")
    show.write_csv(verdict.summaries, verdict.teachers, base.with_name(f"{base.name}-summary.csv"))
    with new_plot(base.with_name(f"{base.name}.png")) as figure:
        show.draw_plot(figure, verdict.summaries, verdict.teachers, verdict.title)
    CONSOLE.print(f"{base}-summary.md", f"{base}-summary.csv", f"{base}.png", sep="\n")
