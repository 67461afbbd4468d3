"""Functions that Ultralytics' training loop calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.engine import trainer as engine
from ultralytics.utils import torch_utils

from yolokd.patches.patched import patched
from yolokd.runtime.console import replaced_in_log
from yolokd.runtime.files import atomic_path


@contextmanager
def bfloat16_on_cpu() -> Iterator[None]:
    """Allow `amp=bf16` on CPUs inside the block; all other settings of autocast work as before.

    Replaces: `engine.trainer.autocast`.
    Why: Ultralytics raises RuntimeError for bfloat16 on anything but CUDA, although torch supports it on CPUs.
    Unnecessary once: Ultralytics' `autocast` accepts bfloat16 on CPUs.
    """
    original_autocast = engine.autocast

    def autocast(enabled: bool | torch.dtype, device: str = "cuda") -> Any:
        if device == "cpu" and enabled is torch.bfloat16:
            return torch.autocast("cpu", torch.bfloat16)
        return original_autocast(enabled, device)

    with patched(engine, "autocast", autocast):
        yield


@contextmanager
def atomic_stripping() -> Iterator[None]:
    """Let Ultralytics strip a finished checkpoint into a temporary file, renamed when it is complete.

    Replaces: `engine.trainer.strip_optimizer`.
    Why: Ultralytics overwrites best.pt and last.pt in place: an interruption or a full disk would destroy them.
    Unnecessary once: Ultralytics writes the stripped checkpoint to another file and renames it.
    """
    original_strip = engine.strip_optimizer

    def strip(f: str | Path, s: str = "", updates: dict[str, Any] | None = None) -> Any:
        with atomic_path(Path(s or f)) as temporary, replaced_in_log(str(temporary), str(s or f)):
            return original_strip(f, str(temporary), updates)

    with patched(engine, "strip_optimizer", strip):
        yield


@contextmanager
def adapters_left_out() -> Iterator[None]:
    """Let Ultralytics count and quantize a student without the criterion, whose adapters serve its training only.

    Replaces: `utils.torch_utils.get_num_params`, `engine.trainer.prepare_qat` and `engine.trainer.restore_qat`.
    Why: Ultralytics counts all parameters of the live model for its loggers, and ModelOpt quantizes all of its
    convolutions. The finished student has no adapters, and what they compare should not be rounded twice.
    Unnecessary once: Ultralytics counts those of the EMA model, and quantizes what it is told to.
    """

    def count(model: nn.Module) -> int:
        parameters = torch_utils.unwrap_model(model).named_parameters()
        return sum(parameter.numel() for name, parameter in parameters if not name.startswith("criterion."))

    with (
        patched(torch_utils, "get_num_params", count),
        patched(engine, "prepare_qat", _without_criterion(engine.prepare_qat)),
        patched(engine, "restore_qat", _without_criterion(engine.restore_qat)),
    ):
        yield


def _without_criterion(quantize: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function that quantizes a model: it takes the criterion off, and puts it on again."""

    def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        criterion = model._modules.pop("criterion", None)
        try:
            return quantize(model, *args, **kwargs)
        finally:
            if criterion is not None:
                model.__dict__.pop("criterion", None)  # the plain loss, which the calibration has computed
                model.add_module("criterion", criterion)

    return call
