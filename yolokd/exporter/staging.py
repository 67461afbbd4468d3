"""A hidden folder in which an export is made and checked, before its files replace older ones."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yolokd.runtime.console import replaced_in_log
from yolokd.runtime.files import sync_folder, write_errors_as_user_errors

PREFIX = ".yolokd-export-"
RECORD_SUFFIX = ".parity.json"


def record_path(file: Path) -> Path:
    """Return the path of the record of an exported file's check: best.parity.json, best.torchscript.parity.json."""
    return file.with_suffix(RECORD_SUFFIX) if file.suffix == ".onnx" else file.with_name(file.name + RECORD_SUFFIX)


@contextmanager
def staging_folder(checkpoint: Path, parent: Path | None = None) -> Iterator[Path]:
    """Yield a new hidden folder in `parent`, with a link to the checkpoint in it, and remove it at the end.

    parent: None for the checkpoint's own folder.
    One export at a time works in a folder; another one waits. So a folder that is there before is what a killed export
    left, and is removed. Log messages show the files of the hidden folder where `publish` will put them.
    Raises UserError for a disk that is full or cannot be written.
    """
    parent = parent or checkpoint.parent
    with write_errors_as_user_errors(parent), _locked(parent):
        for left in parent.glob(f"{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            with contextlib.suppress(OSError):  # Windows may refuse links; Ultralytics only logs the file's size
                (staging / checkpoint.name).symlink_to(checkpoint.absolute())
            with replaced_in_log(f"{staging.name}{os.sep}", ""):
                yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path) -> None:
    """Move all files of a staging folder into the folder that it lies in, where they replace older ones.

    The record of an older check is removed before its file is replaced, and the new record comes last: a record
    never lies beside a file that it was not written for.
    """
    parent = staging.parent
    made = sorted(path for path in staging.iterdir() if not path.is_symlink())
    made.sort(key=lambda path: path.name.endswith(RECORD_SUFFIX))
    for path in made:
        _sync(path)
    for path in made:
        if not path.name.endswith(RECORD_SUFFIX):
            record_path(parent / path.name).unlink(missing_ok=True)
    sync_folder(parent)
    for path in made:
        if path.is_dir() and (parent / path.name).is_dir():  # a folder cannot replace one that holds files
            os.replace(parent / path.name, staging / f"{path.name}.old")
        os.replace(path, parent / path.name)
    sync_folder(parent)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in this block for the same folder. Only POSIX systems can lock a folder."""
    if os.name != "posix":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _sync(path: Path) -> None:
    """Sync a file, or all files of a folder, to the disk."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
