"""Commands that install no packages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ultralytics.utils import checks

from yolokd.patches.patched import patched


@contextmanager
def no_autoinstall() -> Iterator[None]:
    """Let Ultralytics fail on a missing package inside the block, instead of running pip.

    Replaces: `utils.checks.AUTOINSTALL`.
    Why: an export must not change the user's environment, nor must a file: a checkpoint with a key `modelopt`, or an
    image in the format HEIC, makes Ultralytics run pip. It reads YOLO_AUTOINSTALL once, when imported.
    Unnecessary once: Ultralytics asks before it installs, or takes the choice as an argument.
    """
    with patched(checks, "AUTOINSTALL", False):
        yield
