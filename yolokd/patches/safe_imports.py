"""Processes that import nothing from the working folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def safe_imports() -> Iterator[None]:
    """Let Python processes that are started inside the block import nothing from the working folder.

    Replaces: the environment variable PYTHONSAFEPATH, which Python knows since 3.11.
    Why: `python -m` and `python -c`, which torch and multiprocessing use, look for each import in the working folder
    first. In a folder that came from a stranger, a file `multiprocessing.py` would run.
    Unnecessary once: torch's launcher and multiprocessing start Python with `-P`.
    """
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before
