"""Handling of Ctrl-C and SIGTERM: the first stops a training after its step, a second one at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised in a training that a signal stops; `signum` is the signal, the message says how to resume."""

    def __init__(self, signum: int, message: str = "") -> None:
        super().__init__(message)
        self.signum = signum


class StopRequest:
    """The request to stop that a signal makes; `signum` is None until one arrives."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def receive(self, signum: int, _frame: Any) -> None:
        """Note a signal, as a signal handler. Raises Interrupted for the second signal."""
        if self.signum is not None:
            raise Interrupted(signum, "stopped at once")
        self.signum = signum


@contextmanager
def handle_signals(request: StopRequest | None = None) -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a request to stop inside the block, and yield it: the one given, or a new one.

    Changes nothing outside the main thread, where Python cannot handle signals. Leaves a signal alone that was ignored
    before, as shells let background processes ignore SIGINT, or that code outside Python handles (None): Python could
    not put that handler back.
    """
    request = request or StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    handled = [signum for signum in SIGNALS if signal.getsignal(signum) not in (signal.SIG_IGN, None)]
    original_handlers = {signum: signal.signal(signum, request.receive) for signum in handled}
    try:
        yield request
    finally:
        for signum, handler in original_handlers.items():
            signal.signal(signum, handler)
