"""`yolokd methods`: prints a table of the registered methods."""

from __future__ import annotations

from rich.table import Table

from yolokd.config.defaults import method_defaults
from yolokd.config.schema import METHOD_SETTINGS
from yolokd.methods import constants_model, registered
from yolokd.runtime.console import print_table


def list_methods() -> None:
    """Print each registered method with its paper, the teacher's outputs that it needs, and its default constants."""
    table = Table("method", "paper", "needs of the teacher", "constants", title="methods (join several with +)")
    table.show_lines = True
    for name, cls in sorted(registered().items()):
        values = method_defaults(name)
        keys = [k for k in (*METHOD_SETTINGS, *constants_model(cls).model_fields) if k in values]
        constants = "\n".join(f"{name}.{k}={values[k]}" for k in keys)
        wanted = {
            "feature maps": True,
            "class scores": cls.wants_scores(),
            "boxes": cls.wants_boxes,
            "box distributions": cls.wants_box_logits,
            "its head": cls.wants_teacher_head,
        }
        needs = [output for output, is_wanted in wanted.items() if is_wanted]
        table.add_row(name, cls.paper, ", ".join(needs), constants)
    table.add_row("none", "plain Ultralytics training", "no teacher", "")
    table.caption = (
        "gains are those of balance=off; every method also takes NAME.schedule (cosine, linear or constant), and "
        "NAME.warmup and NAME.end in epochs"
    )
    print_table(table)
