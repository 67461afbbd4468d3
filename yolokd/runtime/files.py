"""Files that are written whole or not at all, and known by what they hold."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from yolokd.errors import UserError, first_line

DISK_FULL_BYTES = 2**20  # ours: bytes below which a disk is full


def sha256(path: str | Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, synced and renamed to `path` when the block succeeds: never half a file.

    Raises UserError where it cannot be written, as on a full disk; what was at `path` stays then.
    """
    temporary = Path(path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    try:
        yield temporary
        with open(temporary, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as e:
        full = shutil.disk_usage(path.parent).free < DISK_FULL_BYTES
        if not (full or isinstance(e, OSError) or "inline_container" in str(e)):  # so torch's writer names itself
            raise
        why = os.strerror(errno.ENOSPC) if full else getattr(e, "strerror", None) or first_line(e)
        raise UserError(f"{path}", f"cannot be written: {why}", "what was there is kept; free space or rights") from e
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; not every system lets a folder be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class AtomicPath(type(Path())):  # type: ignore[misc]
    """A path whose `write_bytes` replaces a file whole or not at all: what Ultralytics writes in place."""

    def write_bytes(self, data: Any) -> int:
        """Write to a temporary file, sync, rename."""
        with atomic_path(self) as temporary:
            return temporary.write_bytes(data)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)
