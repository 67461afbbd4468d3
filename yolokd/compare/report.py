"""The verdict of a comparison: tables and a picture for each ground."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from yolokd.compare import show
from yolokd.compare.grounds import by_ground, labelled, mixed_versions, newest, teacher_of
from yolokd.compare.ledger import Row
from yolokd.compare.statistics import summarize
from yolokd.console import CONSOLE, print_table
from yolokd.contenders import PLAIN


def report(shown: Sequence[Row], held: Sequence[Row], baseline: str | None, path: Path) -> None:
    """Print and write the verdict on each ground of the rows shown, beside the ledger at `path`.

    held: all rows of the ledger, which numbers its grounds: files of one are not overwritten by another's. baseline: a
    method; None for `none`, or for each ground's first where that is not there.
    """
    numbers = {ground: number for number, ground in enumerate(by_ground(held), 1)}
    for ground, rows in by_ground(shown).items():
        own = baseline or (PLAIN if any(row.method == PLAIN for row in rows) else rows[0].method)
        number = numbers[ground]
        base = path.with_name(path.stem if number == 1 else f"{path.stem}-{number}")
        _report_ground(rows, teacher_of(rows, shown), own, base)


def _report_ground(rows: Sequence[Row], teacher: Row | None, baseline: str, base: Path) -> None:
    common, named = labelled(rows)
    reference = next((new.method for old, new in zip(rows, named, strict=True) if old.method == baseline), None)
    last = newest(named)
    if dropped := len(named) - len(last):
        CONSOLE.print(f"{dropped} older rows of the same method, settings and seed are left out")
    title = f"{rows[0].student} on {rows[0].data}, scored on {rows[0].split}: {common}"
    if versions := mixed_versions(last):
        title += f"; rows of different versions: {versions}"
    found = summarize(last, reference, teacher)
    lines = [show.cells(summary) for summary in found] + ([show.teacher_cells(teacher)] if teacher else [])
    print_table(show.terminal(lines, title))
    base.with_name(f"{base.name}-summary.md").write_text(show.markdown(lines, title), encoding="utf-8")
    show.write_csv(lines, base.with_name(f"{base.name}-summary.csv"))
    show.draw(found, teacher, title, base.with_name(f"{base.name}.png"))
    CONSOLE.print(f"{base}-summary.md", f"{base}-summary.csv", f"{base}.png", sep="\n")
