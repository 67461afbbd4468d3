"""Execution of a run in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import threading
from contextlib import AbstractContextManager

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers.claim import Claim
from yolokd.commands.compare.train_and_score import train_and_score
from yolokd.patches.safe_imports import safe_imports
from yolokd.runtime.lock import LOCK_FILE, held, inherit_lock

_STARTING = threading.Lock()  # starting a process changes the environment of all threads for a moment


def locked(run: ComparisonRun) -> AbstractContextManager[None]:
    """Lock a run's folder, which is made if it does not exist, against other comparisons and trainings.

    Raises RuntimeError if another comparison is executing this run.
    """
    running = f"{run.method} with seed {run.seed} is running in another comparison"
    return held(run.folder / LOCK_FILE, RuntimeError(f"{running}; repeat this command when that comparison has ended"))


def train_in_process(run: ComparisonRun, device: object, claim: Claim | None = None) -> None:
    """Train and score a run in a new process, unless its scores exist; wait for its end.

    The run's folder, which this process or the one that it works for has locked, receives scores and a log. claim: on
    this folder; the new process ends itself when it is no longer valid, and is killed if the wait is interrupted.
    Raises RuntimeError, naming the log, if the process leaves no scores.
    """
    if run.scores_path.exists():
        return
    process = multiprocessing.get_context("spawn").Process(target=_run_in_process, args=(run, device, claim))
    with _STARTING, safe_imports():
        process.start()
    try:
        while process.is_alive():
            process.join(1)  # short waits: Ray can interrupt Python code between them, but not one long wait
    finally:
        process.kill()
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


def _run_in_process(run: ComparisonRun, device: object, claim: Claim | None) -> None:
    """Train and score a run; the entry point of its process, whose output goes to the run's log."""
    threading.Thread(target=_exit_with_parent, args=(claim,), daemon=True).start()
    with open(run.folder / "log.txt", "ab") as log:  # by descriptor: loggers hold the old streams
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    inherit_lock(run.folder)
    train_and_score(run, device)


def _exit_with_parent(claim: Claim | None) -> None:
    """Exit when the process that started this one ends; otherwise a killed comparison would leave its runs training.

    Exit also when `claim` is no longer valid.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        while parent.is_alive() and (claim is None or claim.is_valid()):
            parent.join(1)
        os._exit(1)
