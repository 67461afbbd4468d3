"""Starts and ends of the processes of one training."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psutil
import torch

from yolokd.errors import UserError
from yolokd.patches.ddp_on_cpu import ddp_on_cpu
from yolokd.runtime.distributed import IS_MAIN, T
from yolokd.runtime.signals import Interrupted, StopRequest, handle_signals


class SignalRelay(StopRequest):
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


def supervise_launch(launch: Callable[[], T], resume_hint: Callable[[], str]) -> T:
    """Launch the processes of a training, and wait for them.

    Raises Interrupted where this process was told to stop, and UserError where one of them has failed.
    """
    with handle_signals(SignalRelay()) as request:
        try:
            return launch()
        except subprocess.CalledProcessError as e:
            if request.signum is not None:
                raise Interrupted(request.signum, resume_hint()) from e
            raise UserError("device", "one of its processes has failed and says why above", resume_hint()) from e


@contextmanager
def worker_process(device: torch.device, request: StopRequest, resume_hint: Callable[[], str]) -> Iterator[None]:
    """Within it, this process trains with the others; it ends in few words, whatever has launched it."""
    try:
        with ddp_on_cpu() if device.type == "cpu" else nullcontext():
            yield
    except UserError as e:
        print(f"yolokd: error: {e}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, RuntimeError):  # the latter where another process, told to stop as well, has gone first
        if request.signum is None:
            raise
        if IS_MAIN:
            print(f"yolokd: interrupted; {resume_hint()}", file=sys.stderr)
        sys.exit(128 + request.signum)
