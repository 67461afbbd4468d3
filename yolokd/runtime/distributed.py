"""Communication between the processes of one training, under Ultralytics' own launch and under torchrun.

Ultralytics derives the number of processes from the device list of one machine, and needs a GPU for each. This module
reads RANK, LOCAL_RANK and WORLD_SIZE, which the launcher sets: any number of machines works, and so do CPUs.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from ultralytics.cfg import get_save_dir
from ultralytics.utils import LOCAL_RANK, RANK
from ultralytics.utils import WORLD_SIZE as LAUNCHED_PROCESSES
from ultralytics.utils.torch_utils import parse_device

from yolokd.errors import UserError

T = TypeVar("T")
IS_MAIN = RANK in {-1, 0}  # whether this process writes files and log lines
IS_DISTRIBUTED = RANK != -1
WORLD_SIZE = LAUNCHED_PROCESSES if IS_DISTRIBUTED else 1
# The number of processes on this machine.
LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE)) if IS_DISTRIBUTED else 1
TIMEOUT = timedelta(hours=3)  # as in Ultralytics: the main process may have to download a data set
# Ours: after the first step, how long a process waits for another one. In minutes.
try:
    STEP_TIMEOUT = timedelta(minutes=float(os.environ.get("YOLOKD_STEP_TIMEOUT", "15")))
except (ValueError, OverflowError) as e:
    given = f"YOLOKD_STEP_TIMEOUT={os.environ['YOLOKD_STEP_TIMEOUT']}"
    raise UserError(given, "is no number of minutes", "for example YOLOKD_STEP_TIMEOUT=30") from e


def init_process_group(device: object) -> str:
    """Join the process group, and return the devices of this machine's processes: `cpu`, or one each as in `0,1`.

    device: the user's; None for one CUDA device per process of this machine, or CPUs if there is no CUDA.
    Raises UserError if the number of devices is not that of the processes.
    """
    devices = str(parse_device(device)) or (
        ",".join(map(str, range(LOCAL_WORLD_SIZE))) if torch.cuda.is_available() else "cpu"
    )
    indices = devices.split(",")
    if devices != "cpu" and not (len(indices) == LOCAL_WORLD_SIZE and all(map(str.isdigit, indices))):
        cure = f"give device=cpu, or {LOCAL_WORLD_SIZE} CUDA devices"
        raise UserError(f"device={device}", f"does not suit {LOCAL_WORLD_SIZE} processes", cure)
    if not dist.is_initialized():
        if devices != "cpu":
            torch.cuda.set_device(int(indices[LOCAL_RANK]))
        dist.init_process_group("gloo" if devices == "cpu" else "nccl", timeout=TIMEOUT)
    return devices


def shorten_timeout() -> None:
    """Let this process wait for others for STEP_TIMEOUT only: from the first step on, all do the same work."""
    if IS_DISTRIBUTED:
        dist.distributed_c10d._set_pg_timeout(STEP_TIMEOUT)


def timed_out(error: BaseException) -> bool:
    """Return whether an error says that another process did not answer in time."""
    return "timed out" in str(error).lower()


def device_of_rank(devices: str) -> torch.device:
    """Return this process's device, out of the devices that `init_process_group` returned."""
    if devices == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(devices.split(",")[LOCAL_RANK]))


def broadcast(value: T) -> T:
    """Return the main process's value in every process."""
    if not IS_DISTRIBUTED:
        return value
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]  # type: ignore[no-any-return]


def all_gather(value: T) -> list[T]:
    """Return the values of all processes, ordered by rank, in every process."""
    if not IS_DISTRIBUTED:
        return [value]
    values: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(values, value)
    return values


def all_reduce_mean(values: Tensor) -> Tensor:
    """Return the mean over the processes in every process; NaN where a process has NaN. Overwrites `values`."""
    if not IS_DISTRIBUTED:
        return values
    dist.all_reduce(values)
    return values.div(WORLD_SIZE)


def shared_save_dir(settings: Any) -> str:
    """Return the run's folder, which the main process chooses and makes; another process would choose the next number.

    settings: Ultralytics' settings. Raises UserError if a process does not see the folder.
    """
    # Only the main process looks before the folder exists: a network file system may cache that it does not.
    chosen = get_save_dir(settings) if IS_MAIN else None
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
    folder = Path(broadcast(str(chosen)))
    if not folder.is_dir():
        raise UserError(
            f"project={folder}", f"does not exist for process {RANK}", "use a folder that all machines share"
        )
    return str(folder)
