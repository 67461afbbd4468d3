"""The folder of a run: whether it can be made."""

from __future__ import annotations

import os
from pathlib import Path

from yolokd.errors import UserError


def check_project(project: object, argument: str = "project") -> Path:
    """Return the absolute path of a folder for runs. Raises UserError if it cannot be made or written.

    argument: the key that names it.
    """
    folder = Path(str(project)).absolute()
    if not _is_writable(folder):
        raise UserError(f"{argument}={project}", "is not a writable folder", "give another one")
    return folder


def _is_writable(folder: Path) -> bool:
    """Return whether a folder can be written, or made and then written."""
    try:
        folder.stat()
    except FileNotFoundError:
        return _is_writable(folder.parent)
    except (OSError, ValueError):  # a file on the way, a name that is too long, a NUL in it
        return False
    return folder.is_dir() and os.access(folder, os.W_OK)
