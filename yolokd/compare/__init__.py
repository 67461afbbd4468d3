"""`yolokd compare`: methods and seeds side by side, each run once, and an honest verdict."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console
from rich.progress import Progress

from yolokd.compare.ledger import TEACHER, append, read
from yolokd.compare.plan import planned
from yolokd.compare.report import report, report_all
from yolokd.compare.runs import Run, carry_out, row_of, stop_all
from yolokd.config import listed
from yolokd.console import CONSOLE
from yolokd.contenders import USUAL, contenders
from yolokd.errors import UserError


def run_compare(
    method: str = USUAL,
    seeds: object = (0, 1, 2),
    split: str = "val",
    csv: str | None = None,
    project: str = "runs/compare",
    device: object = None,
    **keys: Any,
) -> Path:
    """Train each method with each seed, unless the CSV already holds that run; prints the verdict.

    keys: those of `yolokd train`; a method's constants go to the methods that have them. csv: where finished runs are
    kept (PROJECT/compare.csv); alone, it is shown as it is. split: what final checkpoints are scored on; only `test`
    is not also what selects them. device: several (`0,1`) work at once. Writes tables and a picture beside the CSV,
    whose path it returns, for each data set, split and setting of Ultralytics' that it shows. The baseline is `none`,
    or the first method.
    Raises UserError, before anything is trained, for what cannot work, and RuntimeError where runs have failed.
    """
    path = Path(csv or Path(project) / "compare.csv")
    if csv and not keys:
        held = list(read(path).values())
        if all(row.method == TEACHER for row in held):
            raise UserError(f"csv={csv}", "holds no runs", "give teacher=, data= and the rest of a comparison")
        report_all(held, path)
        return path
    methods = contenders(method, keys)
    if len(set(methods)) < len(methods):
        raise UserError(f"method={method}", "names a method twice", "name each once")
    runs, images = planned(methods, seeds, split, Path(project).absolute(), keys)
    held_rows = read(path)
    open_runs = [run for run in runs if run.hash not in held_rows]
    CONSOLE.print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them in {path}")
    failed = _carry_out_all(open_runs, listed(device), path, images)
    held_rows = read(path)
    report([held_rows[run.hash] for run in runs if run.hash in held_rows], held_rows.values(), methods, path)
    if missing := [why for run, why in failed.items() if run not in held_rows]:  # another comparison may have done it
        raise RuntimeError("; ".join(missing))
    return path


def _carry_out_all(runs: Sequence[Run], devices: Sequence[Any], path: Path, images: int) -> dict[str, str]:
    """One run after another on each device, a row for each that is done; {hash: what failed, in words}."""
    free: SimpleQueue[Any] = SimpleQueue()
    for device in devices:
        free.put(device)

    def work(run: Run) -> None:
        device = free.get()
        try:
            carry_out(run, device)
        finally:
            free.put(device)

    failed: dict[str, str] = {}
    with ThreadPoolExecutor(len(devices)) as pool, Progress(console=Console(stderr=True), transient=True) as progress:
        waiting: dict[Future[None], Run] = {pool.submit(work, run): run for run in runs}
        epochs = sum(run.epochs for run in runs)
        task = progress.add_task("", total=epochs)
        try:
            while waiting:
                done, _ = wait(waiting, timeout=1, return_when=FIRST_COMPLETED)
                for future in done:
                    run = waiting.pop(future)
                    if (error := future.exception()) is not None:
                        failed[run.hash] = str(error)
                        continue
                    row = row_of(run, images)
                    append(path, row)
                    CONSOLE.print(f"{run.method} seed {run.seed}: mAP50-95 {row.map:.3f} in {row.seconds:.0f} s")
                progress.update(task, completed=sum(min(run.epochs_done(), run.epochs) for run in runs))
                busy = ", ".join(f"{run.method} seed {run.seed}" for f, run in waiting.items() if f.running())
                progress.update(task, description=f"{len(runs) - len(waiting)} of {len(runs)} runs; {busy}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            stop_all()
            raise
    return failed
