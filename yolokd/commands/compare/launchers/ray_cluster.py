"""The launcher of runs on a Ray cluster, whose nodes share the comparison's folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from time import monotonic
from typing import Any

import ray

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers.claim import place_of, revoke
from yolokd.commands.compare.launchers.execution import Execution
from yolokd.commands.compare.launchers.process import locked
from yolokd.commands.compare.launchers.ray_connection import connected
from yolokd.commands.compare.launchers.ray_nodes import Needs, capacity, check_nodes
from yolokd.commands.compare.launchers.ray_task import execute_on_node
from yolokd.errors import first_line
from yolokd.training.settings import with_absolute_paths

MAX_RETRIES = 10  # ours: how many nodes a run may lose
NODE_SECONDS = 600.0  # ours: how long a cluster may take to replace the last node that could execute a run
STOP_SECONDS = 10.0  # ours: how long nodes may take to kill their runs


def _portable(run: ComparisonRun) -> ComparisonRun:
    """Return a run whose files are found from any folder of any node."""
    strongest = os.path.abspath(run.strongest_teacher) if run.strongest_teacher else ""
    return replace(run, keys=with_absolute_paths(run.keys), strongest_teacher=strongest)


@contextmanager
def launch_on_ray(runs: Sequence[ComparisonRun], needs: Needs) -> Iterator[Execution]:
    """Execute runs on the nodes of a Ray cluster; kill those that are not finished when the block ends.

    needs: what each run takes of its node. The runs of a node that is lost go on on others, from their last
    checkpoints. Raises UserError if there is no cluster that can execute them.
    """
    portable = {run.hash: _portable(run) for run in runs}
    with connected(), ExitStack() as locks:
        check_nodes(list(portable.values()), needs)
        tasks: dict[Future[None], Any] = {}
        futures: dict[Future[None], ComparisonRun] = {}
        try:
            for run in runs:
                future, task = _submit(portable[run.hash], needs, locks)
                futures[future], tasks[future] = run, task
            yield Execution(futures, _Places(futures, needs))
        finally:
            _cancel({future: task for future, task in tasks.items() if not future.done()})


def _submit(run: ComparisonRun, needs: Needs, locks: ExitStack) -> tuple[Future[None], Any]:
    """Lock a run's folder and hand the run to Ray; return a future without Ray's wrapping of errors, and Ray's task."""
    future: Future[None] = Future()
    try:
        locks.enter_context(locked(run))
    except RuntimeError as e:
        future.set_exception(e)
        return future, None
    revoke(run.folder)  # of a process that an earlier comparison, which was killed, may have left

    def pass_on(done: Future[None]) -> None:
        error = done.exception()
        cause: Any = getattr(error, "cause", error)  # what a task raises is the cause of Ray's own error
        if cause is None:
            future.set_result(None)
        elif isinstance(cause, RuntimeError):
            future.set_exception(cause)
        else:
            future.set_exception(RuntimeError(f"{run.method} with seed {run.seed} failed: {first_line(cause)}"))

    execute = ray.remote(execute_on_node).options(
        **needs.options, max_retries=MAX_RETRIES, scheduling_strategy="SPREAD"
    )
    task = execute.remote(run, needs.device, needs.cpus, os.getcwd())
    task.future().add_done_callback(pass_on)
    return future, task


class _Places:
    """Tells where runs are executed at present.

    Raises RuntimeError if no node has been able to execute one for NODE_SECONDS.
    """

    def __init__(self, futures: Mapping[Future[None], ComparisonRun], needs: Needs) -> None:
        self._futures, self._needs, self._had_node = futures, needs, monotonic()

    def __call__(self) -> dict[str, str]:
        """Return {hash of a run: name of the node that executes it}."""
        if capacity(self._needs):
            self._had_node = monotonic()
        elif monotonic() - self._had_node > NODE_SECONDS:
            raise RuntimeError("the cluster has lost all nodes that could execute a run; repeat the command later")
        unfinished = [run for future, run in self._futures.items() if not future.done()]
        return {run.hash: place for run in unfinished if (place := place_of(run.folder))}


def _cancel(tasks: Mapping[Future[None], Any]) -> None:
    """Let tasks kill their runs and end; kill the tasks that do not end in time."""
    for task in tasks.values():
        ray.cancel(task)
    for future in wait(tasks, timeout=STOP_SECONDS).not_done:
        ray.cancel(tasks[future], force=True)
