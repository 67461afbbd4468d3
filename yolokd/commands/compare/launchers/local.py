"""The launcher of runs on devices of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers.execution import Execution
from yolokd.commands.compare.launchers.process import kill_running, locked, train_in_process


@contextmanager
def launch_locally(runs: Sequence[ComparisonRun], devices: Sequence[object]) -> Iterator[Execution]:
    """Execute runs, one at a time on each device; kill those that are not finished when the block ends."""
    free_devices: SimpleQueue[object] = SimpleQueue()
    for device in devices:
        free_devices.put(device)

    def execute_on_free_device(run: ComparisonRun) -> None:
        device = free_devices.get()
        try:
            with locked(run):
                train_in_process(run, device)
        finally:
            free_devices.put(device)

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            futures = {pool.submit(execute_on_free_device, run): run for run in runs}
            yield Execution(futures, lambda: {run.hash: "" for future, run in futures.items() if future.running()})
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            kill_running()
