"""Images that run no other program."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import EpsImagePlugin

from yolokd.patches.patched import patched


@contextmanager
def no_ghostscript() -> Iterator[None]:
    """Let Pillow refuse PostScript inside the block, instead of running Ghostscript.

    Replaces: `PIL.EpsImagePlugin.gs_binary`.
    Why: PostScript is a program. Pillow goes by a file's content, so that an `.avif` or `.heic` file, which Ultralytics
    reads with Pillow, can be PostScript.
    Unnecessary once: Ultralytics names the formats that Pillow may read.
    """
    with patched(EpsImagePlugin, "gs_binary", False):
        yield
