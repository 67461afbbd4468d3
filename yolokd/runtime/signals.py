"""Ctrl-C and SIGTERM stop a training at the end of a step; a second one stops it at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A training that was told to stop; `signum` says how, the message how to go on."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """A wish to stop, once a signal has come."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def receive(self, signum: int, _frame: Any) -> None:
        """Take note of a signal; raises Interrupted for the second."""
        if self.signum is not None:
            raise Interrupted(signum, "stopped at once")
        self.signum = signum


@contextmanager
def handle_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Within it, signals become a request: the one given, or a new one.

    Nothing changes outside the main thread, where Python has no signals, and for a signal that was ignored before, as
    shells have it for what runs in the background.
    """
    request = request or StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.receive) for number in taken}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
