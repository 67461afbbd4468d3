"""Execution of a comparison's runs by a launcher, with a row in the ledger for each finished one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from time import monotonic

from rich.progress import BarColumn, TaskProgressColumn

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers import Launcher
from yolokd.commands.compare.ledger import append
from yolokd.commands.compare.row import make_row
from yolokd.commands.compare.show import deciding
from yolokd.commands.compare.time_left import TimeLeft
from yolokd.runtime.console import CONSOLE, make_progress

Places = Mapping[str, str]  # {hash of a run: where it is executed}


def execute_all(runs: Sequence[ComparisonRun], launch: Launcher, path: Path, images: int) -> dict[str, str]:
    """Execute runs, and append a row to the ledger at `path` for each finished one.

    images: how many an epoch of training has. Returns {hash of a run that failed: why}.
    """
    failures: dict[str, str] = {}
    places: Places = {}
    total, time_left = sum(run.epochs for run in runs), ""
    estimate = TimeLeft(total, _epochs_done(runs), monotonic())
    progress_bar = make_progress(BarColumn(bar_width=15), TaskProgressColumn())
    try:
        with launch(runs) as execution, progress_bar as progress:
            waiting = dict(execution.futures)
            task = progress.add_task("", total=total)
            while waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    run = waiting.pop(future)
                    if (error := future.exception()) is not None:
                        failures[run.hash] = str(error)
                    else:
                        _record(run, path, images, time_left if waiting else "")
                unfinished = list(waiting.values())
                # A run that has ended counts whole: `patience=` may have stopped it early.
                epochs_done = total - sum(run.epochs for run in unfinished) + _epochs_done(unfinished)
                time_left = estimate.describe(epochs_done, monotonic())
                before, places = places, execution.places()
                _print_moves(waiting.values(), before, places)
                parts = (f"{len(runs) - len(waiting)} of {len(runs)} runs", _busy(waiting.values(), places), time_left)
                progress.update(task, completed=epochs_done, description="; ".join(filter(None, parts)))
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt("repeat the same command to continue") from e
    return failures


def _epochs_done(runs: Sequence[ComparisonRun]) -> int:
    return sum(min(run.epochs_done(), run.epochs) for run in runs)


def _record(run: ComparisonRun, path: Path, images: int, time_left: str) -> None:
    """Append a finished run's row to the ledger, and print its score, and how much time is left."""
    row = make_row(run, images)
    append(path, row)
    parts = (
        f"{run.method} seed {run.seed}: {deciding(row.metric)}mAP50-95 {row.map:.3f} in {row.seconds:.0f} s",
        time_left,
    )
    CONSOLE.print("; ".join(filter(None, parts)))


def _print_moves(runs: Iterable[ComparisonRun], before: Places, places: Places) -> None:
    """Print where runs are executed that have started, or that go on at another place."""
    for run in runs:
        if (place := places.get(run.hash)) and place != before.get(run.hash):
            CONSOLE.print(f"{run.method} seed {run.seed}: runs on {place}")


def _busy(runs: Iterable[ComparisonRun], places: Places) -> str:
    """Return the names of the runs that are executed at present, with their places, as text."""
    names = {f"{run.method} seed {run.seed}": places[run.hash] for run in runs if run.hash in places}
    return ", ".join(f"{name} on {place}" if place else name for name, place in names.items())
