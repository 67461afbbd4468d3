"""Save model objects that users pass in Python as files, which checkpoints name and other processes load.

An object is one of three: made from a .yaml, with random weights; loaded from a checkpoint, and not changed since; or
something else, of which a copy is saved.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from platformdirs import user_data_path
from torch import nn
from ultralytics.engine.model import Model

from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model
from yolokd.runtime.files import atomic_path

Source: TypeAlias = str | Path | Any  # a path, an Ultralytics `YOLO` or `RTDETR` object, or a module

MAX_COPIES = 16  # ours: how many copies of objects are kept
MAX_STEM = 64  # ours: characters of a copy's name before its hash


def as_path(source: Source | None, argument: str) -> str | None:
    """Return the path of a source; for a model object, of the file that it comes from or of a copy.

    Raises UserError if the source is neither a path nor a model.
    """
    if source is None or isinstance(source, str | Path):
        return None if source is None else str(source)
    if isinstance(source, Model) and isinstance(source.model, nn.Module) and not source.ckpt:
        return str(source.cfg)  # Ultralytics, too, does not train from its weights: they are random
    module = source.model if isinstance(source, Model) else source
    if not isinstance(module, nn.Module):
        raise UserError(f"{argument}={source}", "is not a model", "give a path, a YOLO object or a module")
    return _unchanged_file(module, argument) or _save_copy(module)


def as_paths(source: Any, argument: str) -> Any:
    """Return `as_path` of one source, or a list of it for each source of a list or tuple."""
    return [as_path(s, argument) for s in source] if isinstance(source, list | tuple) else as_path(source, argument)


def _unchanged_file(module: nn.Module, argument: str) -> str | None:
    """Return the checkpoint that a module was loaded from, if it still has that content."""
    file = getattr(module, "pt_path", None)  # Ultralytics sets it
    if not isinstance(file, str) or not os.path.isfile(file):
        return None
    try:
        original, _ = load_model(file, argument)
    except UserError:
        return None
    return os.path.abspath(file) if module_hash(original) == module_hash(module) else None


def _save_copy(module: nn.Module) -> str:
    """Save a module in the user's data folder, and return the path: what the module is, and a hash of its content.

    The copies used last are kept. A run whose teacher's copy is gone resumes with `teacher=` given anew.
    """
    path = user_data_path("yolokd") / "models" / f"{_name(module)}-{module_hash(module)[:8]}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.touch()
    else:
        with atomic_path(path) as temporary:
            torch.save({"model": module, "train_args": {}}, temporary)
    with suppress(FileNotFoundError):  # another process may remove the same copies
        copies = sorted(path.parent.glob("*.pt"), key=lambda copy: copy.stat().st_mtime_ns)
        for copy in copies[:-MAX_COPIES]:
            copy.unlink()
    return str(path)


def _name(module: nn.Module) -> str:
    """Return what a module is: the name of its checkpoint or .yaml without the ending, else of its class."""
    content = getattr(module, "yaml", None)
    file = content.get("yaml_file") if isinstance(content, dict) else None
    stem = Path(str(getattr(module, "pt_path", None) or file or type(module).__name__.lower())).stem
    return re.sub(r"[^\w.-]", "_", stem)[:MAX_STEM]


def module_hash(module: nn.Module) -> str:
    """Return the SHA-256 of a module's class names, architecture and weights."""
    content = hashlib.sha256(repr((getattr(module, "names", None), getattr(module, "yaml", None))).encode())
    for key, value in module.state_dict().items():
        content.update(key.encode() + value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
