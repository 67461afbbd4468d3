"""Execution of a run in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading

from filelock import FileLock, Timeout

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.train_and_score import train_and_score
from yolokd.patches.safe_imports import safe_imports


def execute_run(run: ComparisonRun, device: object) -> None:
    """Train and score a run in a new process, unless its scores exist; its folder receives scores and a log.

    Raises RuntimeError, naming the log, if the process fails, and if another comparison is executing this run.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run.folder / ".lock", timeout=0):  # two trainings in one folder would break both
            if not run.scores_path.exists():
                _start_process(run, device)
    except Timeout as e:
        raise RuntimeError(
            f"{run.method} with seed {run.seed} is at work in another comparison; repeat this one when that is done"
        ) from e


def _start_process(run: ComparisonRun, device: object) -> None:
    """Start the run's process and wait for its end. Raises RuntimeError if it leaves no scores."""
    process = multiprocessing.get_context("spawn").Process(target=_run_in_process, args=(run, device))
    with safe_imports():
        process.start()
    process.join()
    if process.exitcode != 0 or not run.scores_path.exists():
        log = run.folder / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        lines = [line for line in text.splitlines() if line.strip()]
        reason = lines[-1] if lines else "before it could log anything"
        raise RuntimeError(
            f"{run.method} with seed {run.seed} failed: {reason} (exit code {process.exitcode}; its log is {log})"
        )


def kill_running() -> None:
    """Kill the processes of all runs; a later comparison resumes these runs from their last checkpoints."""
    for process in multiprocessing.active_children():
        process.kill()


def _run_in_process(run: ComparisonRun, device: object) -> None:
    """Train and score a run; the entry point of its process, whose output goes to the run's log."""
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with open(run.folder / "log.txt", "ab") as log:  # by descriptor: loggers hold the old streams
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    train_and_score(run, device)


def _exit_with_parent() -> None:
    """Exit when the comparison's process ends; otherwise a killed comparison would leave its runs training."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
