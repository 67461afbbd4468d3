"""The number of threads that torch trains with on CPUs."""

from __future__ import annotations

import os

import torch

from yolokd.runtime import distributed
from yolokd.runtime.users_threads import threads_of_user

MAX_THREADS = 8  # as in Ultralytics, which also leaves one core idle


def training_threads() -> int:
    """Return the number of threads that torch trains with on CPUs: what the user has set by OMP_NUM_THREADS.

    If nothing is set, it is one per usable core, at most MAX_THREADS; the processes of one training on one machine
    share its cores.
    """
    if (threads := threads_of_user()) is not None:
        return threads
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(MAX_THREADS, cores // distributed.LOCAL_WORLD_SIZE), 1)


def use_all_cores(device: torch.device) -> None:
    """Set torch's number of threads to `training_threads()` on CPUs; Ultralytics' device selection resets it."""
    # Measured on 2 cores: this is faster than to leave a core free for a worker or thread that prepares batches.
    if device.type == "cpu":
        torch.set_num_threads(training_threads())
