"""Processes that kill themselves at an operation on files."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import signal
from collections.abc import Callable
from itertools import count
from typing import Any

from helpers.cli import SERVER

OPERATIONS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "symlink")


def fork_until_killed(function: Callable[..., Any], *args: Any, number: int) -> int:
    """Run a function in a fork of this process that sends itself SIGKILL at its `number`th operation on files.

    Returns the fork's exit status: negative if it was killed, 0 if the function ended before. It must not use torch,
    whose threads do not survive a fork.
    """
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run_and_kill(number, function, *args)
            os._exit(0)
        os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run_until_killed(function: Callable[..., Any], *args: Any, number: int) -> int:
    """Run a function as `fork_until_killed` does, in a process that may use torch."""
    process = SERVER.Process(target=run_and_kill, args=(number, function, *args))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "still running"
    return process.exitcode


def run_and_kill(number: int, function: Callable[..., Any], *args: Any) -> None:
    """Run a function; kill this process at its `number`th operation on files."""
    counter = count(1)

    def reached() -> None:
        if next(counter) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    for name in OPERATIONS:
        _watch(os, name, reached)
    for module in (builtins, io):
        _watch_writing(module, reached)
    function(*args)


def _watch(owner: Any, name: str, reached: Callable[[], None]) -> None:
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        reached()
        return original(*args, **kwargs)

    setattr(owner, name, call)


def _watch_writing(owner: Any, reached: Callable[[], None]) -> None:
    """Count each `open` that creates or empties a file, after it has done so."""
    original = owner.open

    def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = original(file, mode, *args, **kwargs)
        if "w" in mode:
            reached()
        return opened

    owner.open = call
