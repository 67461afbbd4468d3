"""The console that commands print on; it wraps neither paths nor sentences."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

CONSOLE = Console(soft_wrap=True)
TABLE_WIDTH = 210  # in characters, for output to a file or a pipe, which has no width of its own


def print_table(table: Table) -> None:
    """Print a table; do not cut it off in a file or a pipe."""
    (CONSOLE if CONSOLE.is_terminal else Console(width=TABLE_WIDTH)).print(table)
