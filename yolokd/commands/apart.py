"""Runs a function in a process of its own, whose memory and threads are nobody else's."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from yolokd.errors import first_line
from yolokd.patches.safe_imports import safe_imports

T = TypeVar("T")


class ProcessFailure(Exception):
    """The error for a function that gave no result in a process of its own; its message says why."""


def call_apart(function: Callable[..., T], *arguments: Any, timeout: float | None = None) -> T:
    """Return `function(*arguments)`, computed in a new process that imports what the function's module needs.

    Raises ProcessFailure if the function raises an error, if the process dies, or after `timeout` seconds.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_result, args=(sender, function, arguments))
    with safe_imports():
        process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            raise ProcessFailure(f"gave no result in {timeout:g} seconds")
        succeeded, result = receiver.recv()
    except EOFError as e:
        process.join()
        raise ProcessFailure(f"its process died (exit code {process.exitcode})") from e
    finally:
        process.kill()
        process.join()
    if not succeeded:
        raise ProcessFailure(result)
    return result  # type: ignore[no-any-return]


def _send_result(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Send whether the function succeeded, and its result or the first line of its error."""
    try:
        sender.send((True, function(*arguments)))
    except Exception as e:  # of any type, as runtimes raise them
        sender.send((False, first_line(e)))
