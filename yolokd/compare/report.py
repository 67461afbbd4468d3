"""The verdict of a comparison: tables and a picture for each ground."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from yolokd.compare import show
from yolokd.compare.grounds import by_ground, ground_of, labelled, mixed_versions, teacher_of
from yolokd.compare.ledger import TEACHER, Row
from yolokd.compare.statistics import summarize
from yolokd.console import CONSOLE, print_table
from yolokd.contenders import PLAIN


def report(shown: Sequence[Row], held: Iterable[Row], methods: Sequence[str], path: Path) -> None:
    """Print and write the verdict on the rows of one comparison, beside the ledger at `path`.

    held: all rows of the ledger. methods: of the comparison; the baseline is `none`, or the first.
    """
    teacher = next((row for row in shown if row.method == TEACHER), None)
    rows = [row for row in shown if row.method != TEACHER]
    if rows:
        number = list(by_ground(held)).index(ground_of(rows[0]))
        _report_ground(rows, labelled(rows), teacher, methods, _base(path, number))


def report_all(held: Sequence[Row], path: Path) -> None:
    """Print and write the verdict on each ground of the ledger at `path`, as far as its words tell them apart.

    The baseline is `none`, or a ground's first method.
    """
    for number, (ground, rows) in enumerate(by_ground(held).items()):
        common, named = labelled(rows)
        if len({(row.method, row.seed) for row in named}) < len(rows):
            CONSOLE.print(
                f"{ground}: holds several rows of one method and seed, whose files or defaults differ; "
                "give teacher=, data= and the rest of the comparison to see its own"
            )
            continue
        methods = [row.method for row in rows]
        _report_ground(rows, (common, named), teacher_of(rows, held), methods, _base(path, number))


def _base(path: Path, number: int) -> Path:
    """Where the files of a ground begin, by its number in the ledger: one's are not overwritten by another's."""
    return path.with_name(path.stem if number == 0 else f"{path.stem}-{number + 1}")


def _report_ground(
    rows: Sequence[Row], labels: tuple[str, list[Row]], teacher: Row | None, methods: Sequence[str], base: Path
) -> None:
    common, named = labels
    baseline = PLAIN if PLAIN in methods else methods[0]
    reference = next((new.method for old, new in zip(rows, named, strict=True) if old.method == baseline), None)
    title = f"{rows[0].student} on {rows[0].data}, scored on {rows[0].split}: {common}"
    if versions := mixed_versions(rows):
        title += f"; rows of different versions: {versions}"
    found = summarize(named, reference, teacher)
    lines = [show.cells(summary) for summary in found] + ([show.teacher_cells(teacher)] if teacher else [])
    print_table(show.terminal(lines, title))
    base.with_name(f"{base.name}-summary.md").write_text(show.markdown(lines, title), encoding="utf-8")
    show.write_csv(lines, base.with_name(f"{base.name}-summary.csv"))
    show.picture(found, teacher, title).savefig(base.with_name(f"{base.name}.png"), dpi=150)
    CONSOLE.print(f"{base}-summary.md", f"{base}-summary.csv", f"{base}.png", sep="\n")
