"""Functions of Ultralytics, replaced while its training loop runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from logging import LogRecord
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER, torch_utils

from yolokd.patches.patched import patched
from yolokd.runtime.files import atomic_path


@contextmanager
def bfloat16_on_cpu() -> Iterator[None]:
    """Within it, `amp=bf16` works on CPUs too, where Ultralytics' loop refuses it; other settings are as ever."""
    theirs = engine.autocast

    def autocast(enabled: bool | torch.dtype, device: str = "cuda") -> Any:
        if device == "cpu" and enabled is torch.bfloat16:
            return torch.autocast("cpu", torch.bfloat16)
        return theirs(enabled, device)

    with patched(engine, "autocast", autocast):
        yield


@contextmanager
def atomic_stripping() -> Iterator[None]:
    """Within it, Ultralytics' stripping of finished checkpoints replaces them whole or not at all."""
    theirs = engine.strip_optimizer

    def strip(f: str | Path, s: str = "", updates: dict[str, Any] | None = None) -> Any:
        def name(record: LogRecord) -> bool:
            record.msg = str(record.msg).replace(str(temporary), str(s or f))
            return True

        with atomic_path(Path(s or f)) as temporary:
            LOGGER.addFilter(name)
            try:
                return theirs(f, str(temporary), updates)
            finally:
                LOGGER.removeFilter(name)

    with patched(engine, "strip_optimizer", strip):
        yield


@contextmanager
def adapters_not_counted() -> Iterator[None]:
    """Within it, what loggers tell of a student's size leaves out what serves its training alone."""

    def count(model: nn.Module) -> int:
        own = torch_utils.unwrap_model(model).named_parameters()
        return sum(parameter.numel() for name, parameter in own if not name.startswith("criterion."))

    with patched(torch_utils, "get_num_params", count):
        yield
