"""`yolokd compare`: methods and seeds side by side, each run once, and an honest verdict."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console
from rich.progress import Progress

from yolokd.commands.candidates import DEFAULT_METHODS, PLAIN, parse_candidates
from yolokd.commands.compare.ledger import TEACHER, append, read
from yolokd.commands.compare.plan import plan_runs
from yolokd.commands.compare.report import report, report_all
from yolokd.commands.compare.runs import ComparisonRun, execute_run, kill_running, make_row
from yolokd.config.arguments import as_list
from yolokd.errors import UserError
from yolokd.runtime.console import CONSOLE
from yolokd.training.settings import check_device


def run_compare(
    method: str | None = None,
    seeds: object = None,
    split: str | None = None,
    csv: str | Path | None = None,
    project: str | Path = "runs/compare",
    device: object = None,
    **keys: Any,
) -> Path:
    """Train each method with each seed, unless the CSV already holds that run; prints the verdict.

    method: `none,native,sl2,…` unless given. seeds: 0, 1 and 2. keys: those of `yolokd train`; a method's constants go
    to the methods that have them. csv: where finished runs are kept (PROJECT/compare.csv); alone, it is shown as it
    is. split: what final checkpoints are scored on (val); only `test` is not also what selects them. device: several
    (`0,1`) work at once. Prints the verdict on these methods and seeds, and writes tables and a picture beside the CSV,
    whose path it returns, of all that it holds on the same data set, split and settings of Ultralytics'. The baseline
    is `none`, as far as the CSV holds it, or the first method.
    Raises UserError, before anything is trained, for what cannot work, and RuntimeError where runs have failed.
    """
    path = Path(str(csv)) if csv else Path(str(project)) / "compare.csv"
    if csv and not keys:
        for key, value in (("method", method), ("seeds", seeds), ("split", split)):
            if value is not None:
                raise UserError(key, "chooses what to train, with nothing to train on", "give teacher= and data=, too")
        held = list(read(path).values())
        if all(row.method == TEACHER for row in held):
            raise UserError(f"csv={csv}", "holds no runs", "give teacher=, data= and the rest of a comparison")
        report_all(held, path)
        return path
    methods = parse_candidates(method or DEFAULT_METHODS, keys)
    if len(set(methods)) < len(methods):
        raise UserError(f"method={method}", "names a method twice", "name each once")
    for one in as_list(device):
        check_device(one)
    with_baseline = methods if PLAIN in methods else [PLAIN, *methods]
    folder = Path(str(project)).absolute()
    every, images = plan_runs(with_baseline, (0, 1, 2) if seeds is None else seeds, split or "val", folder, keys)
    runs = [run for run in every if run.method in (TEACHER, *methods)]
    held_rows = read(path)
    open_runs = [run for run in runs if run.hash not in held_rows]
    CONSOLE.print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them in {path}")
    failed = _carry_out_all(open_runs, as_list(device), path, images)
    held_rows = read(path)
    report([held_rows[run.hash] for run in every if run.hash in held_rows], list(held_rows.values()), methods, path)
    if missing := [why for run, why in failed.items() if run not in held_rows]:  # another comparison may have done it
        raise RuntimeError("; ".join(missing))
    return path


def _carry_out_all(runs: Sequence[ComparisonRun], devices: Sequence[Any], path: Path, images: int) -> dict[str, str]:
    """One run after another on each device, a row for each that is done; {hash: what failed, in words}."""
    free: SimpleQueue[Any] = SimpleQueue()
    for device in devices:
        free.put(device)

    def work(run: ComparisonRun) -> None:
        device = free.get()
        try:
            execute_run(run, device)
        finally:
            free.put(device)

    failed: dict[str, str] = {}
    with ThreadPoolExecutor(len(devices)) as pool, Progress(console=Console(stderr=True), transient=True) as progress:
        waiting: dict[Future[None], ComparisonRun] = {pool.submit(work, run): run for run in runs}
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
                    row = make_row(run, images)
                    append(path, row)
                    CONSOLE.print(f"{run.method} seed {run.seed}: mAP50-95 {row.map:.3f} in {row.seconds:.0f} s")
                progress.update(task, completed=sum(min(run.epochs_done(), run.epochs) for run in runs))
                busy = ", ".join(f"{run.method} seed {run.seed}" for f, run in waiting.items() if f.running())
                progress.update(task, description=f"{len(runs) - len(waiting)} of {len(runs)} runs; {busy}")
        except BaseException as e:
            pool.shutdown(wait=False, cancel_futures=True)
            kill_running()
            if isinstance(e, KeyboardInterrupt):
                raise KeyboardInterrupt("the same command goes on") from e
            raise
    return failed
