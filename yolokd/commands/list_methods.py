"""`yolokd methods`: a table of every registered method."""

from __future__ import annotations

from rich.table import Table

from yolokd.config.defaults import method_defaults
from yolokd.config.schema import SETTINGS
from yolokd.methods import constants_model, registered
from yolokd.runtime.console import print_table


def list_methods() -> None:
    """Print every registered method: paper, what it needs, constants with their defaults."""
    table = Table("method", "paper", "needs", "constants", title="methods (join several with +)", show_lines=True)
    for name, cls in sorted(registered().items()):
        values = method_defaults(name)
        shown = [k for k in (*SETTINGS, *constants_model(cls).model_fields) if k in values]
        constants = "\n".join(f"{name}.{k}={values[k]}" for k in shown)
        table.add_row(name, cls.paper, "maps, class scores" if cls.wants_scores() else "maps", constants)
    table.add_row("none", "plain Ultralytics training", "no teacher", "")
    table.caption = "all also take NAME.schedule=cosine, linear or constant, NAME.warmup and NAME.end (in epochs)"
    print_table(table)
