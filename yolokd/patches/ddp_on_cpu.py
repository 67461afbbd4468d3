"""Ultralytics' training over several processes, without GPUs."""

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
    """torch's, without the device's index that Ultralytics gives: a CPU has none."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **settings: Any) -> None:
        super().__init__(module, None if device_ids == [None] else device_ids, **settings)


@contextmanager
def ddp_on_cpu() -> Iterator[None]:
    """Within it, Ultralytics' training over several processes needs no GPU: the one place where it insists on them."""
    backend = validator.AutoBackend

    class _Index:
        @staticmethod
        def current_device() -> int:
            return 0

    def on_cpu(*args: Any, **settings: Any) -> Any:
        return backend(*args, **{**settings, "device": torch.device("cpu")})

    with (
        patched(nn.parallel, "DistributedDataParallel", _AnyDeviceDDP),
        patched(validator, "AutoBackend", on_cpu),
        patched(validator, "get_torch_device_backend", lambda _: _Index),
    ):
        yield
