"""yolokd: distil a large Ultralytics YOLO into a small one that you can ship."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from yolokd.runtime.users_threads import note_users_threads
from yolokd.version import __version__

__all__ = ["Method", "UserError", "YoloDistiller", "__version__", "distillation_trainer", "register"]

note_users_threads()  # before any module imports Ultralytics

if TYPE_CHECKING:
    from yolokd.distiller import YoloDistiller, distillation_trainer
    from yolokd.errors import UserError
    from yolokd.methods import Method, register

_HOMES = {
    "Method": "yolokd.methods",
    "UserError": "yolokd.errors",
    "YoloDistiller": "yolokd.distiller",
    "distillation_trainer": "yolokd.distiller",
    "register": "yolokd.methods",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use: a typo on the command line need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'yolokd' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
