"""How many threads torch trains with on CPUs."""

from __future__ import annotations

import os

import torch

from yolokd.runtime import distributed

MOST_THREADS = 8  # Ultralytics' own bound on torch's threads on CPUs; it leaves one core idle besides


def training_threads() -> int:
    """How many threads torch trains with on CPUs: one for each core that this process may use, up to Ultralytics' 8.

    Several processes on one machine share its cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(min(MOST_THREADS, cores // distributed.LOCAL_WORLD_SIZE), 1)


def use_all_cores(device: torch.device) -> None:
    """Give torch all `training_threads()` on CPUs; Ultralytics' device selection resets them."""
    # Measured on 2 cores: faster than a core kept free, also for a worker or a thread that prepares batches.
    if device.type == "cpu":
        torch.set_num_threads(training_threads())
