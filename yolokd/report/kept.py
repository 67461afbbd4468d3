"""What a report needs of a run that no other file of its folder holds; it lies there as report.npz."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from yolokd.errors import UserError, describe_invalid, first_line
from yolokd.report.seen.maps import LevelMaps
from yolokd.runtime.files import atomic_path

NAME = "report.npz"
MAX_BYTES = 2**26  # ours: of the arrays in a file that is read; a run keeps about a hundredth of that
RECORD = "record"


class Skipped(BaseModel):
    """How many images of a split were skipped because they or their labels are broken, and how many it has in all."""

    images: int = Field(ge=0)
    total: int = Field(ge=0)


class Record(BaseModel):
    """Facts of a run.

    images: the names of those in the report. teacher_score: mAP50-95 of the last teacher that detects, on the
    validation set. skipped: by split. scores: of the finished student, by Ultralytics' names.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    images: list[str] = []
    teacher_score: float | None = None
    skipped: dict[str, Skipped] = {}
    scores: dict[str, float] = {}


@dataclass(frozen=True)
class Kept:
    """The facts of a run, and maps of its student before the training."""

    record: Record = field(default_factory=Record)
    before: LevelMaps = field(default_factory=dict)


def write_kept(folder: Path, record: Record, before: LevelMaps) -> None:
    """Write report.npz. Raises UserError if the file cannot be written."""
    arrays: dict[str, Any] = {RECORD: np.array(record.model_dump_json())}
    for level, maps in before.items():
        arrays |= {f"{level}/{name}": array.astype(np.float16) for name, array in maps.items()}
    with atomic_path(folder / NAME) as temporary, open(temporary, "wb") as f:
        np.savez_compressed(f, **arrays)


def read_kept(folder: Path) -> Kept:
    """Return the content of report.npz; nothing if there is no such file. It runs no code from the file.

    Raises UserError if the file is broken.
    """
    path = folder / NAME
    if not path.is_file():
        return Kept()
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise ValueError("holds more than a report needs")
        with np.load(path, allow_pickle=False) as content:
            record = Record.model_validate_json(str(content[RECORD]))
            maps = {name: content[name].astype(np.float32) for name in content.files if name != RECORD}
    except ValidationError as e:
        raise _broken(path, describe_invalid(e)) from e
    except Exception as e:  # whatever the readers of archives and arrays raise
        raise _broken(path, first_line(e)) from e
    before: LevelMaps = {}
    for name, array in maps.items():
        level, _, kind = name.partition("/")
        if array.ndim != 3 or len(array) != len(record.images):
            raise _broken(path, f"its {name} has another shape than maps of its images")
        before.setdefault(level, {})[kind] = array
    return Kept(record=record, before=before)


def _broken(path: Path, problem: str) -> UserError:
    return UserError(f"{path}", f"is broken: {problem}", "remove it; the report then goes without the maps before")
