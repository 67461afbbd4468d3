"""Ultralytics' training in several processes, on CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from ultralytics.engine import validator

from yolokd.patches.patched import patched


class _AnyDeviceDDP(DistributedDataParallel):
    """torch's DistributedDataParallel, which ignores the device index None that Ultralytics passes for a CPU."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **settings: Any) -> None:
        super().__init__(module, None if device_ids == [None] else device_ids, **settings)


@contextmanager
def ddp_on_cpu() -> Iterator[None]:
    """Let Ultralytics train in several processes on CPUs inside the block.

    Replaces: `torch.nn.parallel.DistributedDataParallel`, and `AutoBackend` and `get_torch_device_backend` in
    `engine.validator`.
    Why: Ultralytics passes `device_ids=[None]` for a CPU, which torch rejects, and in a process of a distributed run
    its validator always takes a GPU.
    Unnecessary once: the trainer omits `device_ids` on CPUs, and the validator takes the trainer's device.
    """
    original_backend = validator.AutoBackend

    class _DeviceBackend:
        @staticmethod
        def current_device() -> int:
            return 0

    def backend_on_cpu(*args: Any, **settings: Any) -> Any:
        return original_backend(*args, **{**settings, "device": torch.device("cpu")})

    with (
        patched(nn.parallel, "DistributedDataParallel", _AnyDeviceDDP),
        patched(validator, "AutoBackend", backend_on_cpu),
        patched(validator, "get_torch_device_backend", lambda _: _DeviceBackend),
    ):
        yield
