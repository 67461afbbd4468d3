"""What a node of a Ray cluster does for a comparison."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

import ray

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers.claim import Claim
from yolokd.commands.compare.launchers.process import train_in_process
from yolokd.runtime.users_threads import set_threads


def missing_files(files: Sequence[str]) -> list[str]:
    """Return the files that this node does not see."""
    return [file for file in files if not os.path.exists(file)]


def execute_on_node(run: ComparisonRun, device: str, cpus: int, folder: str) -> None:
    """Train and score a run on this node, with as many threads as it has CPUs.

    folder: the comparison's working folder. Raises RuntimeError, naming the log, if the run fails.
    """
    with contextlib.suppress(OSError):  # this node may lack it; paths of files are absolute
        os.chdir(folder)
    set_threads(cpus)
    claim = Claim(run.folder, _name_place())
    with claim.held():
        train_in_process(run, device, claim)


def _name_place() -> str:
    """Return this node's name, with a part of Ray's name that tells nodes of one machine apart, and the run's GPU."""
    gpus = ray.get_gpu_ids()
    node = f"{socket.gethostname()} ({ray.get_runtime_context().get_node_id()[:8]})"
    return f"{node} GPU {gpus[0]}" if gpus else node
