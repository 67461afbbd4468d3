"""`yolokd compare`: train methods with several seeds, each run once, and print a verdict on their differences."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from time import monotonic
from typing import Any

from rich.progress import BarColumn, TaskProgressColumn

from yolokd.commands.candidates import DEFAULT_METHODS, PLAIN, parse_candidates
from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.ledger import TEACHER, append, read
from yolokd.commands.compare.plan import plan_runs
from yolokd.commands.compare.process import execute_run, kill_running
from yolokd.commands.compare.report import report, report_all
from yolokd.commands.compare.row import make_row
from yolokd.commands.compare.time_left import TimeLeft
from yolokd.commands.run_folder import check_project
from yolokd.config.arguments import as_list
from yolokd.errors import UserError
from yolokd.runtime.console import CONSOLE, make_progress
from yolokd.runtime.files import check_output_folder
from yolokd.training.settings import check_device

DEFAULT_SEEDS = (0, 1, 2)


def run_compare(
    method: str | None = None,
    seeds: object = None,
    split: str | None = None,
    csv: str | Path | None = None,
    project: str | Path = "runs/compare",
    device: object = None,
    **keys: Any,
) -> Path:
    """Train each method with each seed, unless the ledger already holds that run; return the ledger's path.

    method: `none,native,sl2,…` unless given. seeds: 0, 1 and 2 unless given. split: the split that scores final
    checkpoints (val); only `test` was not also used to choose these checkpoints. csv: the ledger, which keeps finished
    runs (PROJECT/compare.csv); without other keys, its verdict is shown and nothing is trained. device: several
    (`0,1`) execute runs at the same time. keys: those of `yolokd train`; a method's constants apply to the candidates
    that contain this method.

    Prints the verdict on these methods and seeds. Writes, beside the ledger, tables and a plot of all its runs with the
    same student, data set, split and settings of Ultralytics. The baseline is `none` if the ledger holds it, otherwise
    the first method.
    Raises UserError, before anything is trained, for what cannot work, and RuntimeError if runs have failed.
    """
    path = Path(str(csv)) if csv else Path(str(project)) / "compare.csv"
    if csv and not keys:
        _show_ledger(path, {"method": method, "seeds": seeds, "split": split})
        return path
    devices = as_list(device)
    methods = _check_methods(method, devices, keys)
    with_baseline = methods if PLAIN in methods else [PLAIN, *methods]
    folder = check_project(project)
    planned, images = plan_runs(with_baseline, DEFAULT_SEEDS if seeds is None else seeds, split or "val", folder, keys)
    runs = [run for run in planned if run.method in (TEACHER, *methods)]
    ledger = read(path)
    open_runs = [run for run in runs if run.hash not in ledger]
    for output in (folder, *(run.folder for run in open_runs)):
        check_output_folder(output, "project")
    CONSOLE.print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them in {path}")
    failures = _execute_all(open_runs, devices, path, images)
    ledger = read(path)
    report([ledger[run.hash] for run in planned if run.hash in ledger], list(ledger.values()), methods, path)
    if missing := [why for run, why in failures.items() if run not in ledger]:  # another comparison may have done it
        raise RuntimeError("; ".join(missing))
    return path


def _show_ledger(path: Path, training_keys: dict[str, object]) -> None:
    """Print and write the verdict on all runs of a ledger.

    Raises UserError if one of `training_keys` is given, which choose what to train, and if the ledger holds no runs.
    """
    for key, value in training_keys.items():
        if value is not None:
            raise UserError(key, "chooses what to train, with nothing to train on", "give teacher= and data=, too")
    rows = list(read(path).values())
    if all(row.method == TEACHER for row in rows):
        raise UserError(f"csv={path}", "holds no runs", "give teacher=, data= and the other keys of a comparison")
    report_all(rows, path)


def _check_methods(method: str | None, devices: Sequence[object], keys: dict[str, Any]) -> list[str]:
    """Return the methods to compare. Raises UserError for methods or devices that cannot be used."""
    methods = parse_candidates(method or DEFAULT_METHODS, keys)
    if len(set(methods)) < len(methods):
        raise UserError(f"method={method}", "names a method twice", "name each once")
    for device in devices:
        check_device(device)
    return methods


def _execute_all(runs: Sequence[ComparisonRun], devices: Sequence[Any], path: Path, images: int) -> dict[str, str]:
    """Execute runs, one at a time on each device, and append a row to the ledger at `path` for each finished one.

    images: how many an epoch of training has. Returns {hash of a run that failed: why}.
    """
    free_devices: SimpleQueue[Any] = SimpleQueue()
    for device in devices:
        free_devices.put(device)

    def execute_on_free_device(run: ComparisonRun) -> None:
        device = free_devices.get()
        try:
            execute_run(run, device)
        finally:
            free_devices.put(device)

    failures: dict[str, str] = {}
    total, time_left = sum(run.epochs for run in runs), ""
    estimate = TimeLeft(total, _epochs_done(runs), monotonic())
    progress_bar = make_progress(BarColumn(bar_width=15), TaskProgressColumn())
    with ThreadPoolExecutor(len(devices)) as pool, progress_bar as progress:
        waiting: dict[Future[None], ComparisonRun] = {pool.submit(execute_on_free_device, run): run for run in runs}
        task = progress.add_task("", total=total)
        try:
            while waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    run = waiting.pop(future)
                    if (error := future.exception()) is not None:
                        failures[run.hash] = str(error)
                    else:
                        _record(run, path, images, time_left if waiting else "")
                epochs_done = _epochs_done(runs)
                time_left = estimate.describe(epochs_done, monotonic())
                busy = ", ".join(f"{run.method} seed {run.seed}" for f, run in waiting.items() if f.running())
                parts = (f"{len(runs) - len(waiting)} of {len(runs)} runs", busy, time_left)
                progress.update(task, completed=epochs_done, description="; ".join(filter(None, parts)))
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            kill_running()
            if isinstance(e, KeyboardInterrupt):
                raise KeyboardInterrupt("repeat the same command to continue") from e
            raise
    return failures


def _epochs_done(runs: Sequence[ComparisonRun]) -> int:
    return sum(min(run.epochs_done(), run.epochs) for run in runs)


def _record(run: ComparisonRun, path: Path, images: int, time_left: str) -> None:
    """Append a finished run's row to the ledger, and print its score, and how much time is left."""
    row = make_row(run, images)
    append(path, row)
    parts = (f"{run.method} seed {run.seed}: mAP50-95 {row.map:.3f} in {row.seconds:.0f} s", time_left)
    CONSOLE.print("; ".join(filter(None, parts)))
