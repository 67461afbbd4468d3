"""The lock of a run's folder: two trainings that write into one folder would mix their rows and weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from yolokd.errors import UserError
from yolokd.runtime.distributed import IS_MAIN

LOCK_FILE = ".train.lock"
VARIABLE = "YOLOKD_LOCKED_FOLDER"  # of the environment: the processes that a training launches must not lock again


@contextmanager
def held(file: Path, refusal: Exception) -> Iterator[None]:
    """Hold a lock file inside the block, in a folder that is made if needed; raise `refusal` if another holds it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(file).acquire(timeout=0)
    except Timeout as e:
        raise refusal from e
    with lock:
        yield


def inherit_lock(folder: Path) -> None:
    """Let trainings of this process write into a folder that the process which started it has locked."""
    os.environ[VARIABLE] = str(folder.resolve())


class FolderLock:
    """Locks the folder of a run for one training; the operating system releases it when the process ends."""

    def __init__(self) -> None:
        self._lock: FileLock | None = None

    def take(self, folder: str | Path | None) -> None:
        """Lock a folder, which is made if it does not exist; do nothing for None and for a folder that is held already.

        Raises UserError if another training holds it.
        """
        if folder is None or not IS_MAIN:
            return
        folder = Path(folder).resolve()  # as Ultralytics does: one folder has one name
        if os.environ.get(VARIABLE) == str(folder):
            return
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK_FILE, is_singleton=True)  # one process may make several trainers
        try:
            lock.acquire(timeout=0)
        except Timeout as e:
            problem = "another training is writing into this folder"
            raise UserError(f"save_dir={folder}", problem, "wait until it ends, or give another save_dir=") from e
        self._lock = lock
        os.environ[VARIABLE] = str(folder)

    def release(self) -> None:
        """Release the lock, if it is held."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            os.environ.pop(VARIABLE, None)

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """Release the lock if the block fails."""
        try:
            yield
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> None:
        """Keep the lock inside the block, and release it after."""

    def __exit__(self, *_: object) -> None:
        self.release()
