"""The report of a launcher about the runs that it executes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from yolokd.commands.compare.identity import ComparisonRun


@dataclass(frozen=True)
class Execution:
    """Runs that a launcher executes.

    futures: of all runs; one is done when its run has ended, and holds an exception if the run has failed. places:
    returns where runs are executed at present, as {hash: name of the place}; the name is empty if there is one place
    only. It raises RuntimeError if the runs that wait can no longer be executed.
    """

    futures: Mapping[Future[None], ComparisonRun]
    places: Callable[[], Mapping[str, str]]
