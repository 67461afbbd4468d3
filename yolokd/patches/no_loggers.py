"""Build trainers without trackers of experiments."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ultralytics.utils import callbacks

from yolokd.patches.patched import patched


@contextmanager
def no_loggers() -> Iterator[None]:
    """Build Ultralytics' trainers without MLflow, Weights & Biases and the like inside the block.

    Replaces: `ultralytics.utils.callbacks.add_integration_callbacks`.
    Why: a trainer begins a run of each tracker when it is built, and a benchmark builds many that train nothing.
    Unnecessary once: trackers can be chosen for each training.
    """
    with patched(callbacks, "add_integration_callbacks", _add_none):
        yield


def _add_none(_instance: Any) -> None:
    """Add no callback."""
