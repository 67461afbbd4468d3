"""The verdict of a comparison: tables and a picture for each ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolokd.compare import show
from yolokd.compare.grounds import by_ground, ground_of, labelled, mixed_versions, teacher_of
from yolokd.compare.ledger import TEACHER, Row
from yolokd.compare.statistics import Summary, summarize
from yolokd.console import CONSOLE, print_table
from yolokd.contenders import NATIVE, PLAIN


def report(shown: Sequence[Row], held: Sequence[Row], methods: Sequence[str], path: Path) -> None:
    """Print the verdict on the rows of one comparison; write that on their whole ground beside the ledger at `path`.

    held: all rows of the ledger. methods: of the comparison; the baseline is `none`, or the first where it has no row.
    """
    teacher = next((row for row in shown if row.method == TEACHER), None)
    rows = [row for row in shown if row.method != TEACHER]
    if not rows:
        return
    verdict = _verdict(rows, teacher, methods)
    print_table(show.terminal(verdict.lines, verdict.title))
    grounds, ground = by_ground(held), ground_of(rows[0])
    wanted = {row.hash for row in (*rows, *grounds[ground])}
    whole = [row for row in held if row.hash in wanted]
    if _told_apart(whole):
        verdict = _verdict(whole, teacher, methods)
    _write(verdict, _base(path, list(grounds).index(ground)))


def report_all(held: Sequence[Row], path: Path) -> None:
    """Print and write the verdict on each ground of the ledger at `path`, as far as its words tell them apart.

    The baseline is `none`, or a ground's first method.
    """
    for number, (ground, rows) in enumerate(by_ground(held).items()):
        if not _told_apart(rows):
            CONSOLE.print(
                f"{ground}: holds several rows of one method and seed, whose files or defaults differ; "
                "give teacher=, data= and the rest of the comparison to see its own"
            )
            continue
        verdict = _verdict(rows, teacher_of(rows, held), [row.method for row in rows])
        print_table(show.terminal(verdict.lines, verdict.title))
        _write(verdict, _base(path, number))


@dataclass(frozen=True)
class Verdict:
    """What is told of some rows of one ground."""

    title: str
    found: Sequence[Summary]
    teacher: Row | None
    lines: Sequence[tuple[str, ...]]


def _base(path: Path, number: int) -> Path:
    """Where the files of a ground begin, by its number in the ledger: one's are not overwritten by another's."""
    return path.with_name(path.stem if number == 0 else f"{path.stem}-{number + 1}")


def _told_apart(rows: Sequence[Row]) -> bool:
    return len({(row.method, row.seed) for row in labelled(rows)[1]}) == len(rows)


def _verdict(rows: Sequence[Row], teacher: Row | None, methods: Sequence[str]) -> Verdict:
    common, named = labelled(rows)
    names: dict[str, list[str]] = {}  # those by which each method goes
    for old, new in zip(rows, named, strict=True):
        names.setdefault(old.method, []).append(new.method)
    baseline = next((names[method][0] for method in (PLAIN, methods[0]) if method in names), None)
    natives = set(names.get(NATIVE, ()))
    native = natives.pop() if len(natives) == 1 else None
    title = f"{rows[0].student} on {rows[0].data}, scored on {rows[0].split}: {common}"
    if versions := mixed_versions(rows):
        title += f"; rows of different versions: {versions}"
    found = summarize(named, baseline, native, teacher)
    lines = [show.cells(summary) for summary in found] + ([show.teacher_cells(teacher)] if teacher else [])
    return Verdict(title, found, teacher, lines)


def _write(verdict: Verdict, base: Path) -> None:
    markdown = show.markdown(verdict.lines, verdict.title)
    base.with_name(f"{base.name}-summary.md").write_text(markdown, encoding="utf-8")
    show.write_csv(verdict.lines, base.with_name(f"{base.name}-summary.csv"))
    show.picture(verdict.found, verdict.teacher, verdict.title).savefig(base.with_name(f"{base.name}.png"), dpi=150)
    CONSOLE.print(f"{base}-summary.md", f"{base}-summary.csv", f"{base}.png", sep="\n")
