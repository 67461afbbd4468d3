"""Loading of models without running code from their files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.nn.distill_model import FeatureHook
from ultralytics.utils import torch_utils

from yolokd.errors import UserError
from yolokd.patches.patched import patched

DATA_FORMATS = frozenset({"pt", "onnx", "dnn"})  # AutoBackend's names of formats that we know to run no code

restricted_load = tasks.torch_safe_load
all_backends, load_torchscript = AutoBackend._BACKEND_MAP, torch.jit.load


@contextmanager
def safe_models() -> Iterator[None]:
    """Load models inside the block without running code from their files.

    A checkpoint may hold objects of known classes only, and no hooks on its layers; a model's .yaml may name known
    layers only; of exported models, ONNX files alone are read.

    Replaces: `nn.tasks.SAFE_LOAD`, `nn.tasks.torch_safe_load`, `utils.torch_utils.torch_load`, `torch.jit.load`, and
    `AutoBackend._BACKEND_MAP`.
    Why: a pickle and the `activation:` of a model's .yaml can run any code, and Ultralytics allows it by default: it
    reads ULTRALYTICS_SAFE_LOAD once, when imported. Its restricted loading keeps the hooks of layers, which are
    functions that run at each forward pass, and `strip_optimizer` loads best.pt without restriction. TorchScript is a
    program that can write files; YOLOE's text model is TorchScript, and Ultralytics looks for it in the working folder.
    TensorFlow's, TensorRT's and other formats can hold programs, too.
    Unnecessary once: `load_checkpoint`, `DetectionModel`, `strip_optimizer` and `YOLO` take an argument that forbids
    such code.
    """
    backends = {k: v if k in DATA_FORMATS else _refuse_format for k, v in AutoBackend._BACKEND_MAP.items()}
    with (
        patched(tasks, "SAFE_LOAD", True),
        patched(tasks, "torch_safe_load", _load_without_hooks),
        patched(torch_utils, "torch_load", lambda file, **_: _load_without_hooks(file)[0]),
        patched(torch.jit, "load", _refuse_format),
        patched(AutoBackend, "_BACKEND_MAP", backends),
    ):
        yield


@contextmanager
def own_exports() -> Iterator[None]:
    """Let exported models of all formats run inside the block, which may lie inside one of `safe_models`.

    Replaces: what `safe_models` puts in the place of `torch.jit.load` and `AutoBackend._BACKEND_MAP`.
    Why: files that this process has exported hold no stranger's programs, while the data set may be a stranger's.
    Unnecessary once: `safe_models` is.
    """
    with patched(torch.jit, "load", load_torchscript), patched(AutoBackend, "_BACKEND_MAP", all_backends):
        yield


def _refuse_format(model: object, *_: Any, **__: Any) -> None:
    problem = "has a format that can hold programs, which would run"
    raise UserError(f"model={model}", problem, "give a .pt or .onnx file, or trust=True to run it")


def _load_without_hooks(weight: str | Path, safe_only: bool | None = None) -> tuple[Any, str]:
    """Load a checkpoint, restricted. Raises TypeError for a hook that is not one of Ultralytics' own distillation."""
    checkpoint, file = restricted_load(weight, safe_only=True)
    for value in checkpoint.values():
        for layer in value.modules() if isinstance(value, nn.Module) else ():
            if any(type(hook) is not FeatureHook for hook in _hooks(layer)):
                raise TypeError(f"{weight} has a hook on a layer, which is outside the supported format")
    return checkpoint, file


def _hooks(layer: nn.Module) -> Iterator[Any]:
    """Yield the hooks of a layer (on forward and backward passes and on state_dict), and those of its tensors."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    groups = [value for name, value in vars(layer).items() if name.endswith("_hooks")]
    for group in groups + [tensor._backward_hooks for tensor in tensors]:
        yield from group.values() if isinstance(group, dict) else ()
