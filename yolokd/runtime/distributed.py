"""Several processes at one training: how they meet, agree and end, under Ultralytics' own launch and under torchrun.

Ultralytics counts a run's processes by the device list of one machine, and wants a GPU for each. Here the launcher's
RANK, LOCAL_RANK and WORLD_SIZE count, over any number of machines, and CPUs will do.
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
IS_MAIN = RANK in {-1, 0}  # whether this process writes and speaks
IS_DISTRIBUTED = RANK != -1
WORLD_SIZE = LAUNCHED_PROCESSES if IS_DISTRIBUTED else 1
LOCAL_WORLD_SIZE = (
    int(os.environ.get("LOCAL_WORLD_SIZE", WORLD_SIZE)) if IS_DISTRIBUTED else 1
)  # processes on this machine
PATIENCE = timedelta(hours=3)  # Ultralytics' own: the first process may have a data set to download


def init_process_group(device: object) -> str:
    """Meet the other processes; returns the devices of this machine's, `cpu` or `0,1`: one each.

    device: as given; None for as many CUDA devices as processes here, or CPUs where there is none.
    Raises UserError where devices and processes do not fit.
    """
    devices = str(parse_device(device)) or (
        ",".join(map(str, range(LOCAL_WORLD_SIZE))) if torch.cuda.is_available() else "cpu"
    )
    indices = devices.split(",")
    if devices != "cpu" and not (len(indices) == LOCAL_WORLD_SIZE and all(map(str.isdigit, indices))):
        fitting = f"give device=cpu, or {LOCAL_WORLD_SIZE} CUDA devices"
        raise UserError(f"device={device}", f"does not suit {LOCAL_WORLD_SIZE} processes", fitting)
    if not dist.is_initialized():
        if devices != "cpu":
            torch.cuda.set_device(int(indices[LOCAL_RANK]))
        dist.init_process_group("gloo" if devices == "cpu" else "nccl", timeout=PATIENCE)
    return devices


def device_of_rank(devices: str) -> torch.device:
    """This process's among those that `init_process_group` returned."""
    if devices == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(devices.split(",")[LOCAL_RANK]))


def broadcast(value: T) -> T:
    """The first process's value, in all of them."""
    if not IS_DISTRIBUTED:
        return value
    found: list[Any] = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[no-any-return]


def all_gather(value: T) -> list[T]:
    """All processes' values by rank, in all of them."""
    if not IS_DISTRIBUTED:
        return [value]
    found: list[Any] = [None] * WORLD_SIZE
    dist.all_gather_object(found, value)
    return found


def all_reduce_mean(values: Tensor) -> Tensor:
    """The mean over the processes, in all of them; NaN where one of them has it."""
    if not IS_DISTRIBUTED:
        return values
    dist.all_reduce(values)
    return values.div(WORLD_SIZE)


def shared_save_dir(settings: Any) -> str:
    """The run's folder, as the first process names it: the others would see that it exists and count on.

    settings: Ultralytics'. Raises UserError where a process does not see it.
    """
    named = get_save_dir(settings) if IS_MAIN else None  # a look at it before it exists may be remembered by a network
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
    folder = Path(broadcast(str(named)))
    if not folder.is_dir():
        raise UserError(f"project={folder}", f"is not seen by process {RANK}", "give a folder that all machines share")
    return str(folder)
