"""The console that commands print on: text appears as it is, and tables leave out columns on a narrow terminal."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

TABLE_WIDTH = 225  # in characters, for output to a file or a pipe, which has no width of its own
MIN_WRAPPED = 8  # characters that a column of wrapping text keeps
EDGES = 3  # characters that a table's borders and padding add to a column


def make_console(stderr: bool = False, width: int | None = None, soft_wrap: bool = False) -> Console:
    """Return a console that prints `[/red]` and `:smile:` as they are, since names of files may hold them."""
    return Console(stderr=stderr, width=width, soft_wrap=soft_wrap, markup=False, emoji=False)


CONSOLE = make_console(soft_wrap=True)  # wraps neither paths nor sentences


def table_width() -> int:
    """Return the width in characters that a table may have: the terminal's, or TABLE_WIDTH in a file or a pipe."""
    return CONSOLE.width if CONSOLE.is_terminal else TABLE_WIDTH


def print_table(table: Table) -> None:
    """Print a table; do not cut it off in a file or a pipe."""
    make_console(width=table_width()).print(table)


def fit_table(
    headers: Sequence[str],
    lines: Sequence[Sequence[str]],
    width: int,
    optional: Sequence[str] = (),
    wrapped: Collection[str] = (),
    elsewhere: str = "",
) -> Table:
    """Return a table of at most `width` characters, in which no number is cut off.

    optional: headers of the columns that are shown if there is space, the most important first. wrapped: headers of the
    columns whose text may break. elsewhere: where the other columns can be read.
    """
    columns = {column[0]: column for column in zip(headers, *lines, strict=True)}
    needed = {header: _needed_width(column, header in wrapped) + EDGES for header, column in columns.items()}
    spare = width - 1 - sum(needed[header] for header in headers if header not in optional)
    for header in optional:
        if needed[header] <= spare:
            spare -= needed[header]
        else:
            del columns[header]
    left_out = [header for header in headers if header not in columns]
    caption = f"not shown: {', '.join(left_out)}; {elsewhere}" if left_out else None
    table = Table(caption=caption, caption_justify="left")
    for header in sorted(columns, key=lambda header: header not in wrapped):
        wanted = max(map(cell_len, columns[header])) + EDGES
        least = MIN_WRAPPED + EDGES if header in wrapped else needed[header]  # text gives space away if there is none
        growth = min(max(spare, least - needed[header]), wanted - needed[header])
        spare, needed[header] = spare - growth, needed[header] + growth
    for header in columns:
        table.add_column(header, width=needed[header] - EDGES, overflow="fold")
    for line in zip(*(column[1:] for column in columns.values()), strict=True):
        table.add_row(*line)
    return table


def _needed_width(column: Sequence[str], wraps: bool) -> int:
    """Return the least width of a column (header, cells): of its longest word if it wraps, else of its longest cell."""
    header, *cells = column
    texts = [word for cell in cells for word in cell.split()] if wraps else cells
    return max(map(cell_len, [*header.split(), *texts]))


def make_progress(*columns: ProgressColumn) -> Progress:
    """Return a progress bar on stderr that disappears at the end; its descriptions appear as they are."""
    columns = columns or (BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    description = TextColumn("{task.description}", markup=False)
    return Progress(description, *columns, console=make_console(stderr=True), transient=True)


@contextmanager
def warnings_only() -> Iterator[None]:
    """Let Ultralytics log warnings and errors only, inside the block."""
    logger = logging.getLogger("ultralytics")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what libraries print, log and warn inside the block; for work whose failures are reported in another way."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def replaced_in_log(old: str, new: str) -> Iterator[None]:
    """Replace a text in what Ultralytics logs inside the block."""

    def replace(record: logging.LogRecord) -> bool:
        record.msg = str(record.msg).replace(old, new)
        return True

    logger = logging.getLogger("ultralytics")
    logger.addFilter(replace)
    try:
        yield
    finally:
        logger.removeFilter(replace)
