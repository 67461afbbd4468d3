"""How the processes of one training start and end, under Ultralytics' launch and under torchrun."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import psutil
import torch

from yolokd.data.fingerprint import content_hash, image_names_hash
from yolokd.errors import UserError
from yolokd.patches.ddp_on_cpu import ddp_on_cpu
from yolokd.patches.safe_imports import safe_imports
from yolokd.runtime.distributed import (
    IS_DISTRIBUTED,
    IS_MAIN,
    STEP_TIMEOUT,
    T,
    all_gather,
    all_reduce_mean,
    shorten_timeout,
    timed_out,
)
from yolokd.runtime.late_flags import LateFlags
from yolokd.runtime.signals import SIGNALS, Interrupted, StopRequest, handle_signals


class SharedStopRequest(StopRequest):
    """A request to stop that all processes of a training follow after the same step.

    If one process stopped by itself, the others would wait for it in the next exchange of gradients. resume_hint:
    returns what to tell the user.
    """

    def __init__(self, resume_hint: Callable[[], str]) -> None:
        super().__init__()
        self._resume_hint = resume_hint
        self._flags: LateFlags[None] = LateFlags()

    def raise_if_received(self) -> None:
        """Raise Interrupted if this process has received a signal."""
        if self.signum is not None:
            raise Interrupted(self.signum, self._resume_hint())

    def raise_if_agreed(self, device: torch.device) -> None:
        """Raise Interrupted in all processes if one of them had received a signal by the step before this one.

        All processes call this after each step.
        """
        if IS_DISTRIBUTED:
            received = torch.stack([torch.full((), float(self.signum == signum), device=device) for signum in SIGNALS])
            late = self._flags.exchange(all_reduce_mean(received) > 0, None)
            if late is None or not any(late[0]):
                return
            self.signum = SIGNALS[late[0].index(True)]
        self.raise_if_received()


def stop_together(trainer: Any) -> None:
    """Stop a training after its step if a signal has come, as a callback of Ultralytics."""
    trainer.stop_request.raise_if_agreed(trainer.device)


class SignalRelay(StopRequest):
    """Passes signals from the launching process to the training processes; a second signal kills them."""

    def __init__(self) -> None:
        super().__init__()
        self._before = set(psutil.Process().children())  # children that the user's program started

    def receive(self, signum: int, frame: Any) -> None:
        """Pass a signal on. Raises Interrupted for the second one."""
        launchers = set(psutil.Process().children()) - self._before
        from_terminal = signum == signal.SIGINT and sys.stdin is not None and sys.stdin.isatty()  # sends it to all
        for launcher in launchers:
            with suppress(psutil.NoSuchProcess):
                if self.signum is not None:
                    for process in [*launcher.children(recursive=True), launcher]:
                        with suppress(psutil.NoSuchProcess):
                            process.kill()
                elif not from_terminal:
                    launcher.send_signal(signum)
        super().receive(signum, frame)


def same_content_hash(loader: Any) -> str:
    """Return the `content_hash` of a training's images and labels; from here on, processes wait for STEP_TIMEOUT only.

    loader: this process's training loader. Raises UserError if the processes see different images or labels: they would
    wait for each other without end.
    """
    content = content_hash(loader.dataset)
    seen = all_gather((len(loader.dataset.im_files), image_names_hash(loader.dataset), content))
    other = next((rank for rank, images in enumerate(seen) if images != seen[0]), None)
    if other is not None:
        counts = f"process {other} sees {seen[other][0]} training images, process 0 sees {seen[0][0]}"
        raise UserError("data", f"{counts}, or their labels differ", "give every machine the same files")
    shorten_timeout()
    return content


def supervise_launch(launch: Callable[[], T], resume_hint: Callable[[], str]) -> T:
    """Launch the processes of a training, wait for them, and return what `launch` returns.

    Raises Interrupted if this process received a signal, and UserError if one of the processes failed.
    """
    with handle_signals(SignalRelay()) as request, safe_imports():
        try:
            return launch()
        except subprocess.CalledProcessError as e:
            if request.signum is not None:
                raise Interrupted(request.signum, resume_hint()) from e
            raise UserError("device", "one of its processes has failed and says why above", resume_hint()) from e


@contextmanager
def worker_process(device: torch.device, request: StopRequest, resume_hint: Callable[[], str]) -> Iterator[None]:
    """Train as one of several processes inside the block; end the process with one line if it fails or is stopped.

    Without it, each process would print a traceback under torchrun and Ultralytics' launcher.
    """
    try:
        with ddp_on_cpu() if device.type == "cpu" else nullcontext():
            yield
    except UserError as e:
        print(f"yolokd: error: {e}", file=sys.stderr)
        sys.exit(2)
    except (Interrupted, RuntimeError) as e:  # RuntimeError if another process stopped first
        if request.signum is None and timed_out(e):
            problem = f"another process has not answered for {STEP_TIMEOUT}: it is stopped, or its machine is gone"
            print(f"yolokd: error: {UserError('device', problem, resume_hint())}", file=sys.stderr)
            sys.exit(2)
        if request.signum is None:
            raise
        if IS_MAIN:
            print(f"yolokd: interrupted; {resume_hint()}", file=sys.stderr)
        sys.exit(128 + request.signum)
