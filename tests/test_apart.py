"""Functions that run in a process of their own: results, errors, deaths, time limits."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from yolokd.commands.apart import ProcessFailure, call_apart


def test_the_result_comes_from_another_process() -> None:
    assert call_apart(os.getpid) not in {os.getpid(), os.getppid()}


@pytest.mark.parametrize(
    ("function", "argument", "message"),
    [
        (math.sqrt, -1.0, "math domain error|expected a nonnegative input"),
        (os._exit, 3, r"its process died \(exit code 3\)"),
        (time.sleep, 60, r"gave no result in 0\.2 seconds"),
    ],
)
def test_a_function_without_a_result_says_why(function: Callable[..., Any], argument: float, message: str) -> None:
    with pytest.raises(ProcessFailure, match=message):
        call_apart(function, argument, timeout=0.2 if function is time.sleep else 60)
