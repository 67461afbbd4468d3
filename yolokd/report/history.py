"""results.csv of a run, epoch by epoch."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, nan
from pathlib import Path

from yolokd.errors import UserError

MAP = "metrics/mAP50-95(B)"  # the score of a detector


@dataclass(frozen=True)
class History:
    """The columns of results.csv, one value for each epoch, NaN where there is none; seconds: of all epochs."""

    epochs: list[float]
    columns: dict[str, list[float]]
    seconds: float

    def column(self, name: str) -> list[float]:
        """Return a column; NaN in each epoch if there is none."""
        return self.columns.get(name, [nan] * len(self.epochs))

    def best_epoch(self, name: str = MAP) -> float | None:
        """Return the epoch with the highest score in the column `name`, or None if no epoch has one."""
        scored = [(score, -epoch) for epoch, score in zip(self.epochs, self.column(name), strict=True) if score > 0]
        return -max(scored)[1] if scored else None


def read_history(folder: Path) -> History:
    """Return the history of a run; also the epochs of files that a resume with other columns has set aside."""
    before = sorted(folder.glob("results-to-*.csv"), key=lambda path: path.stat().st_mtime)
    rows: dict[float, dict[str, float]] = {}
    clock = [0.0]
    for row in _rows([*before, folder / "results.csv"]):
        epoch = row.get("epoch", nan)
        if isfinite(epoch):
            rows[epoch] = row  # an epoch that was interrupted is there twice: the second one counts
            clock.append(row.get("time", nan))
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    epochs = sorted(rows)
    # Ultralytics' clock starts at 0 again in a resumed run.
    steps = (now - earlier if now >= earlier else now for earlier, now in pairwise(filter(isfinite, clock)))
    return History(epochs, {name: [rows[epoch].get(name, nan) for epoch in epochs] for name in columns}, sum(steps))


def _rows(paths: Iterable[Path]) -> Iterable[dict[str, float]]:
    for path in paths:
        if not path.is_file():
            continue
        try:
            with open(path, encoding="utf-8", newline="") as f:
                for row in csv.DictReader(f):
                    yield {str(k).strip(): _number(v) for k, v in row.items()}
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise UserError(f"{path}", "cannot be read", "give the folder of a run with an intact results.csv") from e


def _number(text: object) -> float:
    """Return a finite number, or NaN for anything else."""
    try:
        number = float(str(text))
    except ValueError:
        return nan
    return number if isfinite(number) else nan
