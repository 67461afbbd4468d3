"""Refusal of checkpoints whose tensors claim more memory than their files hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn import tasks

from yolokd.patches.patched import patched


class TensorSizeError(ValueError):
    """A tensor of a file claims more memory than the file holds for it."""


@contextmanager
def checked_tensor_sizes() -> Iterator[None]:
    """Raise TensorSizeError inside the block if a checkpoint holds a tensor that is larger than its data.

    Replaces: `nn.tasks.torch_safe_load`.
    Why: a tensor may repeat one number a trillion times (a stride of 0), and its file stays small. Ultralytics then
    converts it to float32 before anyone can look at it, which takes terabytes, and a system may end the process.
    Unnecessary once: torch or Ultralytics refuses such tensors.
    """
    original_load = tasks.torch_safe_load

    def load(*args: Any, **kwargs: Any) -> Any:
        checkpoint, file = original_load(*args, **kwargs)
        check_tensor_sizes(checkpoint)
        return checkpoint, file

    with patched(tasks, "torch_safe_load", load):
        yield


def check_tensor_sizes(content: Any) -> None:
    """Raise TensorSizeError if a tensor anywhere in loaded content is larger than its data, or has none."""
    for tensor in _tensors(content):
        if tensor.is_meta or tensor.layout is not torch.strided:
            raise TensorSizeError("a tensor has no data")
        data_size = tensor.untyped_storage().nbytes()
        if tensor.nbytes > data_size:
            raise TensorSizeError(f"a tensor claims {tensor.nbytes} bytes, and its data has {data_size}")


def _tensors(content: Any) -> Iterator[Tensor]:
    """Yield the tensors in dictionaries, sequences and modules, at any depth."""
    waiting, seen = [content], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict | list | tuple | set | nn.Module) and id(value) not in seen:
            seen.add(id(value))
            members = vars(value) if isinstance(value, nn.Module) else value
            waiting.extend(members.values() if isinstance(members, dict) else members)
