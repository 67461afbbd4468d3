"""The claim of a process on a run's folder: when another one claims it, on whatever machine, the first gives way.

A lock would not do: a file server may hold the lock of a machine that was lost forever, and the processes of a machine
that was only cut off from its cluster still write.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from yolokd.runtime.files import atomic_path

CLAIM_FILE = ".claim"
HANDOVER_SECONDS = 5.0  # ours: a process looks every second whether it still holds its claim


class Claim:
    """A claim on a folder, written into the file CLAIM_FILE there.

    place: where the process that makes it runs, for people.
    """

    def __init__(self, folder: Path, place: str) -> None:
        self._path = folder / CLAIM_FILE
        self._text = f"{place}\n{uuid4().hex}\n"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Claim the folder inside the block; first wait until a process that holds it has given way."""
        is_held = self._path.exists()
        with atomic_path(self._path) as path:
            path.write_text(self._text, encoding="utf-8")
        if is_held:
            time.sleep(HANDOVER_SECONDS)
        try:
            yield
        finally:
            if self.is_valid():
                self._path.unlink()

    def is_valid(self) -> bool:
        """Return whether no other process has claimed the folder since."""
        return _read(self._path) == self._text


def place_of(folder: Path) -> str:
    """Return where the process runs that holds the claim on a folder; empty if there is none."""
    return _read(folder / CLAIM_FILE).partition("\n")[0]


def revoke(folder: Path) -> None:
    """Let a process that holds the claim on a folder give way."""
    (folder / CLAIM_FILE).unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:  # no claim, or a folder that is out of reach
        return ""
