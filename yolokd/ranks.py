"""Several processes at one training: how they meet, agree and end, under Ultralytics' own launch and under torchrun.

Ultralytics counts a run's processes by the device list of one machine, and wants a GPU for each. Here the launcher's
RANK, LOCAL_RANK and WORLD_SIZE count, over any number of machines, and CPUs will do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.cfg import get_save_dir
from ultralytics.engine import validator
from ultralytics.utils import LOCAL_RANK, RANK, WORLD_SIZE
from ultralytics.utils.torch_utils import parse_device

from yolokd.errors import UserError
from yolokd.interrupts import Interrupted, Request, heeded
from yolokd.standin import stand_in

T = TypeVar("T")
FIRST = RANK in {-1, 0}  # whether this process writes and speaks
SEVERAL = RANK != -1
PROCESSES = WORLD_SIZE if SEVERAL else 1
HERE = int(os.environ.get("LOCAL_WORLD_SIZE", PROCESSES)) if SEVERAL else 1  # processes on this machine
PATIENCE = timedelta(hours=3)  # Ultralytics' own: the first process may have a data set to download


def join(device: object) -> str:
    """Meet the other processes; returns the devices of this machine's, `cpu` or `0,1`: one each.

    device: as given; None for as many CUDA devices as processes here, or CPUs where there is none.
    Raises UserError where devices and processes do not fit.
    """
    devices = str(parse_device(device)) or (",".join(map(str, range(HERE))) if torch.cuda.is_available() else "cpu")
    indices = devices.split(",")
    if devices != "cpu" and not (len(indices) == HERE and all(map(str.isdigit, indices))):
        fitting = f"give device=cpu, or {HERE} CUDA devices"
        raise UserError(f"device={device}", f"does not suit {HERE} processes", fitting)
    if not dist.is_initialized():
        if devices != "cpu":
            torch.cuda.set_device(int(indices[LOCAL_RANK]))
        dist.init_process_group("gloo" if devices == "cpu" else "nccl", timeout=PATIENCE)
    return devices


def own_device(devices: str) -> torch.device:
    """This process's among those that `join` returned."""
    if devices == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(devices.split(",")[LOCAL_RANK]))


def firsts(value: T) -> T:
    """The first process's value, in all of them."""
    if not SEVERAL:
        return value
    found: list[Any] = [value]
    dist.broadcast_object_list(found, src=0)
    return found[0]  # type: ignore[no-any-return]


def everyones(value: T) -> list[T]:
    """All processes' values by rank, in all of them."""
    if not SEVERAL:
        return [value]
    found: list[Any] = [None] * PROCESSES
    dist.all_gather_object(found, value)
    return found


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, in all of them; NaN where one of them has it."""
    if not SEVERAL:
        return values
    dist.all_reduce(values)
    return values.div(PROCESSES)


def one_folder(settings: Any) -> str:
    """The run's folder, as the first process names it: the others would see that it exists and count on.

    settings: Ultralytics'. Raises UserError where a process does not see it.
    """
    named = get_save_dir(settings) if FIRST else None  # a look at it before it exists may be remembered by a network
    if named is not None:
        named.mkdir(parents=True, exist_ok=True)
    folder = Path(firsts(str(named)))
    if not folder.is_dir():
        raise UserError(f"project={folder}", f"is not seen by process {RANK}", "give a folder that all machines share")
    return str(folder)


class _OnAnyDevice(DistributedDataParallel):
    """torch's, without the device's index that Ultralytics gives: a CPU has none."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **settings: Any) -> None:
        super().__init__(module, None if device_ids == [None] else device_ids, **settings)


@contextmanager
def on_cpus() -> Iterator[None]:
    """Within it, Ultralytics' training over several processes needs no GPU: the one place where it insists on them."""
    backend = validator.AutoBackend

    class _Index:
        @staticmethod
        def current_device() -> int:
            return 0

    def on_cpu(*args: Any, **settings: Any) -> Any:
        return backend(*args, **{**settings, "device": torch.device("cpu")})

    with (
        stand_in(nn.parallel, "DistributedDataParallel", _OnAnyDevice),
        stand_in(validator, "AutoBackend", on_cpu),
        stand_in(validator, "get_torch_device_backend", lambda _: _Index),
    ):
        yield


class Relay(Request):
    """The request of a process that launches the training: those at work are told, and ended by a second."""

    def __init__(self) -> None:
        super().__init__()
        self._before = set(psutil.Process().children())  # the user's own

    def receive(self, signum: int, frame: Any) -> None:
        """Pass a signal on; raises Interrupted for the second."""
        launchers = set(psutil.Process().children()) - self._before
        heard = signum == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()  # a terminal tells launchers
        for launcher in launchers:
            with suppress(psutil.NoSuchProcess):
                if self.signum is not None:
                    for process in [*launcher.children(recursive=True), launcher]:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                elif not heard:
                    launcher.send_signal(signum)
        super().receive(signum, frame)


def watch_over(launch: Callable[[], T], how_to_go_on: Callable[[], str]) -> T:
    """Launch the processes of a training, and wait for them.

    Raises Interrupted where this process was told to stop, and UserError where one of them has failed.
    """
    with heeded(Relay()) as request:
        try:
            return launch()
        except subprocess.CalledProcessError as e:
            if request.signum is not None:
                raise Interrupted(request.signum, how_to_go_on()) from e
            raise UserError("device", "one of its processes has failed and says why above", how_to_go_on()) from e


@contextmanager
def at_work(device: torch.device, request: Request, how_to_go_on: Callable[[], str]) -> Iterator[None]:
    """Within it, this process trains with the others; it ends in few words, whatever has launched it."""
    try:
        with on_cpus() if device.type == "cpu" else nullcontext():
            yield
    except UserError as e:
        print(f"yolokd: error: {e}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, RuntimeError):  # the latter where another process, told to stop as well, has gone first
        if request.signum is None:
            raise
        if FIRST:
            print(f"yolokd: interrupted; {how_to_go_on()}", file=sys.stderr)
        sys.exit(128 + request.signum)
