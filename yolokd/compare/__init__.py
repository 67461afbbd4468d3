"""`yolokd compare`: methods and seeds side by side, each run once, and an honest verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from rich.console import Console
from rich.progress import Progress

from yolokd.checkpoint import as_paths, sha256
from yolokd.compare import show
from yolokd.compare.ledger import TEACHER, Row, append, read
from yolokd.compare.runs import FILES, INCIDENTAL, Run, carry_out, fingerprint, row_of, stop_all
from yolokd.compare.statistics import labelled, summarize
from yolokd.config import as_teachers, each_teacher, is_own, listed
from yolokd.console import CONSOLE, print_table
from yolokd.contenders import NATIVE, PLAIN, concerns, contenders
from yolokd.data import data_file
from yolokd.errors import UserError
from yolokd.plan import Plan, load_teacher, make_plan, training_keys
from yolokd.pyramid import pair_classes

QUIET = {"plots": False, "verbose": False, "check_teacher": False}
TOLD = ("balance", "level_weights")  # in a row's settings also at their defaults, which may change one day
OURS_ALONE = frozenset({"save_dir", "name", "exist_ok", "resume", "seed", "cfg"})  # each run has its own


def run_compare(
    method: str = "none,native,sl2,dfd,pdf,dfd+pdf",
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
    whose path it returns. The baseline is `none`, or the first method.
    Raises UserError, before anything is trained, for what cannot work, and RuntimeError where runs have failed.
    """
    path = Path(csv or Path(project) / "compare.csv")
    if csv and not keys:
        held = list(read(path).values())
        if not held:
            raise UserError(f"csv={csv}", "holds no runs", "give teacher=, data= and the rest of a comparison")
        _report([row for row in held if row.method != TEACHER], [row for row in held if row.method == TEACHER], path)
        return path
    methods = contenders(method, keys)
    if len(set(methods)) < len(methods):
        raise UserError(f"method={method}", "names a method twice", "name each once")
    runs, images = _planned(methods, _seeds(seeds), split, Path(project).absolute(), keys)
    held_rows = read(path)
    open_runs = [run for run in runs if run.hash not in held_rows]
    CONSOLE.print(f"{len(runs)} runs, {len(runs) - len(open_runs)} of them in {path}")
    failed = _carry_out_all(open_runs, listed(device), path, images)
    held_rows = read(path)
    rows = [held_rows[run.hash] for run in runs if run.hash in held_rows]
    if any(row.method != TEACHER for row in rows):
        _report([row for row in rows if row.method != TEACHER], [row for row in rows if row.method == TEACHER], path)
    if failed:
        raise RuntimeError("; ".join(failed))
    return path


def _planned(
    methods: Sequence[str], seeds: Sequence[int], split: str, project: Path, keys: Mapping[str, Any]
) -> tuple[list[Run], int]:
    """All runs, checked; and the images of an epoch."""
    for key in keys:
        if key in OURS_ALONE:
            raise UserError(key, "is each run's own in a comparison", f"drop {key}")
    given = training_keys({**keys, "teacher": as_teachers(as_paths(keys.get("teacher"), "teacher"))})
    given |= {"student": given.pop("model"), "data": data_file(given["data"])}
    strongest = each_teacher(given["teacher"])[-1] if given["teacher"] else None
    teacher = load_teacher(strongest, bool(given.get("trust"))) if strongest or NATIVE in methods else None
    runs: list[Run] = []
    content: dict[str, Any] = {}
    for method in methods:
        own = {k: v for k, v in given.items() if concerns(k, method) or k == "trust"} | QUIET | {"method": method}
        own |= {"teacher": strongest} if method == NATIVE else {}
        # Ultralytics' own distillation needs what plain training needs, and a teacher
        plan = make_plan(training_keys(own | ({"method": PLAIN} if method == NATIVE else {})))
        if plan.data.get(split) is None:
            raise UserError(f"split={split}", "is not in the data set", "give split=val, or a set that has it")
        content = content or _content(given, plan)
        known = _known(own, plan, content)
        own |= {key: getattr(plan.config, key) for key in TOLD} if plan.config.parts else {}
        runs += [Run(method, s, split, own, json.dumps(known | {"seed": s}, sort_keys=True), project) for s in seeds]
    images = plan.images
    if strongest and teacher and pair_classes(teacher.names, plan.data["names"]).teacher:  # else it has no score here
        known = {"teacher": sha256(strongest), "data": content["data"], "imgsz": given.get("imgsz", 640)}
        own = {**given, "method": TEACHER, "teacher": strongest}
        runs.insert(0, Run(TEACHER, 0, split, own, json.dumps(known, sort_keys=True), project))
    return runs, images


def _content(given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """What the files hold, read once for all runs."""
    student, teachers = given["student"], [sha256(teacher) for teacher in each_teacher(given["teacher"])]
    return {
        "data": fingerprint(plan.data),
        "student": sha256(student) if str(student).endswith(".pt") else student,
        "teacher": teachers if len(teachers) > 1 else (None, *teachers)[-1],
    }


def _known(own: Mapping[str, Any], plan: Plan, content: Mapping[str, Any]) -> dict[str, Any]:
    """All that shapes a training, but for the seed: files by their content, yolokd's settings with their defaults."""
    settings = {k: v for k, v in own.items() if not is_own(k) and k not in INCIDENTAL | FILES}
    known = {"method": own["method"], "settings": settings, "data": content["data"], "student": content["student"]}
    if own["method"] != PLAIN:
        known["teacher"] = sha256(own["teacher"]) if own["method"] == NATIVE else content["teacher"]
    if own["method"] not in (PLAIN, NATIVE):
        known["distillation"] = {k: v for k, v in plan.config.flat().items() if k not in INCIDENTAL | {"teacher"}}
    return known


def _seeds(seeds: object) -> list[int]:
    found = listed(seeds)
    if not found or any(isinstance(s, bool) or not isinstance(s, int) for s in found) or len(set(found)) < len(found):
        raise UserError(f"seeds={seeds}", "must be different whole numbers", "for example seeds=0,1,2")
    return found


def _carry_out_all(runs: Sequence[Run], devices: Sequence[Any], path: Path, images: int) -> list[str]:
    """One run after another on each device, a row for each that is done; returns what failed, in words."""
    free: SimpleQueue[Any] = SimpleQueue()
    for device in devices:
        free.put(device)

    def work(run: Run) -> None:
        device = free.get()
        try:
            carry_out(run, device)
        finally:
            free.put(device)

    failed = []
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
                        failed.append(str(error))
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


def _report(rows: Sequence[Row], teachers: Sequence[Row], path: Path) -> None:
    """Print and write the verdict."""
    teacher = teachers[0] if teachers else None
    common, rows = labelled(rows)
    labels = [row.method for row in rows]
    found = summarize(rows, PLAIN if PLAIN in labels else labels[0], teacher)
    title = f"{rows[0].student} on {rows[0].data}, scored on {rows[0].split}: {common}"
    lines = [show.cells(summary) for summary in found] + ([show.teacher_cells(teacher)] if teacher else [])
    print_table(show.terminal(lines, title))
    base = path.with_suffix("")
    base.with_name(f"{base.name}-summary.md").write_text(show.markdown(lines, title), encoding="utf-8")
    show.write_csv(lines, base.with_name(f"{base.name}-summary.csv"))
    show.draw(found, teacher, title, base.with_suffix(".png"))
    CONSOLE.print(f"{base}-summary.md", f"{base}-summary.csv", f"{base}.png", sep="\n")
