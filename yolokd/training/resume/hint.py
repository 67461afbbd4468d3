"""Tell the user how to continue an interrupted run."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

from yolokd.training.resume.sidecar import sidecars


def stamp(path: Path) -> tuple[int, int] | None:
    """Return what changes when a file is replaced, whatever the clock says; None if there is no file."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def resume_hint(trainer: Any) -> str:
    """Return one sentence that tells the user how to continue an interrupted run."""
    last: Path = trainer.last
    if not trainer.resume and stamp(last) == trainer.last_before:
        return "there is no finished epoch to resume"
    if trainer.finished or (trainer.ddp and not sidecars(last)):
        return "the training is finished"
    return f"continue with: yolokd train resume={quote(str(Path(trainer.save_dir).absolute()))}"
