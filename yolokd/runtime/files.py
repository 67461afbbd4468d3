"""Files that are replaced atomically, hashed, and cleaned up; file errors as user errors."""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from yolokd.errors import UserError, first_line

DISK_FULL_BYTES = 2**20  # ours: a disk with fewer free bytes counts as full
# The endings of what a training or a comparison writes.
WRITTEN = frozenset({".csv", ".html", ".jpg", ".json", ".lock", ".md", ".npz", ".png", ".pt", ".txt", ".yaml"})


def sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder, and rename that file to `path` if the block succeeds.

    So `path` never holds half a file. The file is synced to disk before the rename.
    Raises UserError if the file cannot be written, as on a full disk; `path` then keeps its old content.
    """
    temporary = Path(path.with_name(f".{path.name}.{os.getpid()}.tmp"))
    try:
        with write_errors_as_user_errors(path):
            yield temporary
            with open(temporary, "rb+") as f:
                os.fsync(f.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a CSV with a line of headers, replacing the file in one step; a row may lack columns.

    Raises UserError if the file cannot be written.
    """
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the keys and values in a .yaml file; none if it cannot be read or holds others. It runs no code."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


@contextmanager
def write_errors_as_user_errors(path: Path) -> Iterator[None]:
    """Raise UserError for an error of the disk inside the block, which writes `path`; other errors pass unchanged."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        disk_is_full = shutil.disk_usage(path.parent).free < DISK_FULL_BYTES
        from_torch_writer = "inline_container" in str(e)  # torch raises a RuntimeError that names this source file
        if not (disk_is_full or isinstance(e, OSError) or from_torch_writer):
            raise
        reason = os.strerror(errno.ENOSPC) if disk_is_full else getattr(e, "strerror", None) or first_line(e)
        cure = "the old file is kept; free some space, or get the right to write there"
        raise UserError(f"{path}", f"cannot be written: {reason}", cure) from e


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that a rename in it survives a power failure. Only POSIX systems can open a folder."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class AtomicPath(type(Path())):  # type: ignore[misc]
    """A path whose `write_bytes` replaces the file atomically.

    Ultralytics writes checkpoints by `trainer.last.write_bytes(…)`, in place. With an AtomicPath there, a process that
    is killed while it writes leaves the old checkpoint intact. Paths that are built from it (`path / name`) are
    AtomicPaths too.
    """

    def write_bytes(self, data: Any) -> int:
        """Write to a temporary file, sync it, and rename it. Raises UserError as `atomic_path` does."""
        with atomic_path(self) as temporary:
            return temporary.write_bytes(data)


def check_project(project: object, argument: str = "project") -> Path:
    """Return the absolute path of a folder for runs. Raises UserError if it cannot be made or written.

    argument: the key that names it.
    """
    folder = Path(str(project)).absolute()
    if not _is_writable(folder):
        raise UserError(f"{argument}={project}", "is not a writable folder", "give a folder that can be written")
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


def check_output_folder(folder: Path, argument: str) -> None:
    """Raise UserError if something in `folder`, or in `weights` in it, is in the way of files to be written there.

    A link could lead a file out of the folder; a folder or a device cannot be replaced by a file. The folder need not
    exist. argument: the key that gives it.
    """
    cure = "move it away, or give another folder"
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{argument}={folder}", "is not a folder", cure)
    with os_errors_as_user_errors(lambda: cure):  # one of the two may be a file
        for parent in (folder, folder / "weights"):
            for path in sorted(parent.iterdir()) if os.path.lexists(parent) else ():
                name = path.relative_to(folder)
                if path.is_symlink():
                    raise UserError(f"{argument}={folder}", f"its {name} is a link, which could lead elsewhere", cure)
                if path.suffix in WRITTEN and not path.is_file():
                    raise UserError(f"{argument}={folder}", f"its {name} should be a file and is not", cure)


def remove_temporary_files(folder: Path) -> None:
    """Remove the temporary files that a process left when it was killed while writing."""
    for temporary in folder.glob(".*.tmp"):
        temporary.unlink(missing_ok=True)


@contextmanager
def os_errors_as_user_errors(cure: Callable[[], str]) -> Iterator[None]:
    """Raise UserError for an OSError about a file inside the block: no rights, a full disk, an image that is gone.

    cure: returns the cure that the error names. Other errors, of a network for example, pass unchanged.
    """
    try:
        yield
    except OSError as e:
        image_is_gone = "Image Not Found" in str(e)
        if not (image_is_gone or e.filename or e.errno == errno.ENOSPC):
            raise
        problem = f"{e.strerror}: {e.filename}" if e.filename else str(e.strerror)
        raise UserError("files", first_line(e) if image_is_gone else problem, cure()) from e
