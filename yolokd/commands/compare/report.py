"""The verdict of a comparison: tables and a picture for each ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from yolokd.commands.candidates import NATIVE, PLAIN
from yolokd.commands.compare import show
from yolokd.commands.compare.grounds import by_ground, labelled, mixed_versions, teachers_of
from yolokd.commands.compare.ledger import TEACHER, LedgerRow
from yolokd.commands.compare.statistics import Summary, summarize
from yolokd.runtime.console import CONSOLE, print_table


def report(shown: Sequence[LedgerRow], held: Sequence[LedgerRow], methods: Sequence[str], path: Path) -> None:
    """Print the verdict on the rows of one comparison; write that on their whole ground beside the ledger at `path`.

    held: all rows of the ledger. methods: of the comparison; the baseline is `none`, or the first where it has no row.
    """
    rows = [row for row in shown if row.method != TEACHER]
    if not rows:
        return
    _print(_verdict(rows, held, methods))
    grounds, ground = by_ground(held), rows[0].ground
    _write(_verdict(grounds[ground], held, methods), _base(path, list(grounds).index(ground)))


def report_all(held: Sequence[LedgerRow], path: Path) -> None:
    """Print and write the verdict on each ground of the ledger at `path`.

    The baseline is `none`, or a ground's first method.
    """
    for number, rows in enumerate(by_ground(held).values()):
        verdict = _verdict(rows, held, [row.method for row in rows])
        _print(verdict)
        _write(verdict, _base(path, number))


@dataclass(frozen=True)
class Verdict:
    """What is told of some rows of one ground."""

    title: str
    found: Sequence[Summary]
    teachers: Sequence[LedgerRow]

    @property
    def lines(self) -> list[tuple[str, ...]]:
        """A table's."""
        return [*(show.cells(summary) for summary in self.found), *(show.teacher_cells(row) for row in self.teachers)]


def _base(path: Path, number: int) -> Path:
    """Where the files of a ground begin, by its number in the ledger: one's are not overwritten by another's."""
    return path.with_name(path.stem if number == 0 else f"{path.stem}-{number + 1}")


def _verdict(rows: Sequence[LedgerRow], held: Sequence[LedgerRow], methods: Sequence[str]) -> Verdict:
    common, named = labelled(rows)
    names: dict[str, list[str]] = {}  # those by which each method goes
    for old, new in zip(rows, named, strict=True):
        names.setdefault(old.method, []).append(new.method)
    baseline = next((names[method][0] for method in (PLAIN, methods[0]) if method in names), None)
    natives = set(names.get(NATIVE, ()))
    native = natives.pop() if len(natives) == 1 else None
    first = rows[0]
    title = f"{first.student} on {first.data} (ground {first.ground[:6]}), scored on {first.split}: {common}"
    if versions := mixed_versions(rows):
        title += f"; rows of different versions: {versions}"
    teachers = teachers_of(rows, held)
    return Verdict(title, summarize(named, baseline, native, teachers), teachers)


def _print(verdict: Verdict) -> None:
    print_table(show.terminal(verdict.lines, verdict.title))


def _write(verdict: Verdict, base: Path) -> None:
    markdown = show.markdown(verdict.lines, verdict.title)
    base.with_name(f"{base.name}-summary.md").write_text(markdown, encoding="utf-8")
    show.write_csv(verdict.found, verdict.teachers, base.with_name(f"{base.name}-summary.csv"))
    show.picture(verdict.found, verdict.teachers, verdict.title).savefig(base.with_name(f"{base.name}.png"), dpi=150)
    CONSOLE.print(f"{base}-summary.md", f"{base}-summary.csv", f"{base}.png", sep="\n")
