"""CUDA graphs of a function of a batch: the host launches all of its kernels at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolokd.errors import first_line

T = TypeVar("T")
WARM_UPS = 2  # runs before a capture: libraries choose kernels and allocate workspaces in the first ones


class CudaGraphs:
    """Records a function's kernels on a GPU once, and replays them on new values of its input.

    A step of a small student leaves a GPU idle, because Python launches its kernels more slowly than they run. Those of
    a large teacher, launched one by one as well, would nearly double that time.
    A function is recorded by name. All batches of one name have the same shape and dtype. Results are those of the
    function to the bit. They are overwritten by the next replay: the work that reads them must have been queued before.
    Where recording fails, which is logged once, the function is called as it is.
    """

    def __init__(self) -> None:
        self._recorded: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Any]] = {}
        self._failed = False

    def replay(self, name: Hashable, function: Callable[[Tensor], T], batch: Tensor) -> T:
        """Return function(batch), from the recording under this name; record it if there is none."""
        if name not in self._recorded and not self._failed:
            self._try_to_record(name, function, batch)
        if self._failed:
            return function(batch)
        graph, own_batch, output = self._recorded[name]
        own_batch.copy_(batch)
        graph.replay()
        result: T = output
        return result

    def _try_to_record(self, name: Hashable, function: Callable[[Tensor], Any], batch: Tensor) -> None:
        try:
            self._recorded[name] = _record(function, batch.clone())
        except RuntimeError as e:  # also torch.OutOfMemoryError
            self._failed = True
            self._recorded.clear()
            LOGGER.warning(f"teacher: runs without a CUDA graph, more slowly: {first_line(e)}")


def _record(function: Callable[[Tensor], T], batch: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, T]:
    """Return a graph of function(batch), with the tensors that each replay reads and writes."""
    for _ in range(WARM_UPS):
        function(batch)
    graph = torch.cuda.CUDAGraph()
    # thread_local: the thread of a data loader that pins memory may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function(batch)
    return graph, batch, output
