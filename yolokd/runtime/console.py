"""Where commands print: paths and sentences unbroken, tables as wide as they need."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

CONSOLE = Console(soft_wrap=True)
WIDE = 210  # columns for a table where no terminal says how many there are


def print_table(table: Table) -> None:
    """Print a table, whole also into a file or a pipe."""
    (CONSOLE if CONSOLE.is_terminal else Console(width=WIDE)).print(table)
