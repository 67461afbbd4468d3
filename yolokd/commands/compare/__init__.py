"""`yolokd compare`: train methods with several seeds, each run once, and print a verdict on their differences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yolokd.commands.candidates import DEFAULT_METHODS, PLAIN, parse_candidates
from yolokd.commands.compare.execute import execute_all
from yolokd.commands.compare.launchers import LOCAL, choose_launcher
from yolokd.commands.compare.ledger import TEACHER, read
from yolokd.commands.compare.plan import plan_runs
from yolokd.commands.compare.verdicts import report, report_all
from yolokd.errors import UserError
from yolokd.runtime.console import CONSOLE
from yolokd.runtime.files import check_output_folder, check_project

DEFAULT_SEEDS = (0, 1, 2)


def run_compare(
    method: str | None = None,
    seeds: object = None,
    split: str | None = None,
    csv: str | Path | None = None,
    project: str | Path = "runs/compare",
    device: object = None,
    launcher: str = LOCAL,
    cpus: object = None,
    **keys: Any,
) -> Path:
    """Train each method with each seed, unless the ledger already holds that run; return the ledger's path.

    method: `none,native,sl2,…` unless given. seeds: 0, 1 and 2 unless given. split: the split that scores final
    checkpoints (val); only `test` was not also used to choose these checkpoints. csv: the ledger, which keeps finished
    runs (PROJECT/compare.csv); without other keys, its verdict is shown and nothing is trained. device: several
    (`0,1`) execute runs at the same time. launcher: `ray` executes runs on a Ray cluster, each with a GPU (without
    one if device=cpu) and with `cpus` CPUs (1). keys: those of `yolokd train`; a method's constants apply to the
    candidates that contain this method.

    Prints the verdict on these methods and seeds. Writes, beside the ledger, tables and a plot of all its runs with the
    same student, data set, split and settings of Ultralytics. The baseline is `none` if the ledger holds it, otherwise
    the first method.
    Raises UserError, before anything is trained, for what cannot work, and RuntimeError if runs have failed.
    """
    path = Path(str(csv)) if csv else Path(str(project)) / "compare.csv"
    if csv and not keys:
        for_training = {"method": method, "seeds": seeds, "split": split, "device": device, "cpus": cpus}
        _show_ledger(path, for_training | {"launcher": None if launcher == LOCAL else launcher})
        return path
    methods = _check_methods(method, keys)
    launch = choose_launcher(launcher, device, cpus)
    with_baseline = methods if PLAIN in methods else [PLAIN, *methods]
    folder = check_project(project)
    check_project(path.parent, "csv")
    planned, images = plan_runs(with_baseline, DEFAULT_SEEDS if seeds is None else seeds, split or "val", folder, keys)
    runs = [run for run in planned if run.method in (TEACHER, *methods)]
    ledger = read(path)
    open_runs = [run for run in runs if run.hash not in ledger]
    for output in (folder, *(run.folder for run in open_runs)):
        check_output_folder(output, "project")
    CONSOLE.print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them in {path}")
    failures = execute_all(open_runs, launch, path, images) if open_runs else {}
    ledger = read(path)
    finished = [run for run in planned if run.hash in ledger]
    # Rows of earlier comparisons may refer to another score of the teacher, with other classes or channels.
    rows = {run.hash: ledger[run.hash].model_copy(update={"teacher_row": run.teacher_row}) for run in finished}
    report(list(rows.values()), list((ledger | rows).values()), methods, path)
    if missing := [why for run, why in failures.items() if run not in ledger]:  # another comparison may have done it
        raise RuntimeError("; ".join(missing))
    return path


def _show_ledger(path: Path, training_keys: dict[str, object]) -> None:
    """Print and write the verdict on all runs of a ledger.

    Raises UserError if one of `training_keys` is given, which only a training uses, and if the ledger holds no runs.
    """
    for key, value in training_keys.items():
        if value is not None:
            raise UserError(key, "has no effect: csv= alone trains nothing", "drop it, or give teacher= and data=, too")
    rows = list(read(path).values())
    if all(row.method == TEACHER for row in rows):
        problem = "holds no runs" if path.exists() else "no such file"
        raise UserError(f"csv={path}", problem, "give teacher=, data= and the other keys of a comparison")
    report_all(rows, path)


def _check_methods(method: str | None, keys: dict[str, Any]) -> list[str]:
    """Return the methods to compare. Raises UserError for methods that cannot be used."""
    methods = parse_candidates(method or DEFAULT_METHODS, keys)
    if len(set(methods)) < len(methods):
        raise UserError(f"method={method}", "names a method twice", "name each once")
    return methods
