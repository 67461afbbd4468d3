"""Reading of a device's flags without waiting for the device."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class LateFlags(Generic[T]):
    """Reads flags one step late: by then a GPU has computed them, and the host, which runs ahead of it, need not wait.

    Each step's flags come with a description (of type T) that is returned with them.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None, T] | None = None

    def exchange(self, flags: Tensor, description: T) -> tuple[list[bool], T] | None:
        """Hand in the flags of this step, 1-D bool; return those of the step before it, None in the first step."""
        before = self.read()
        if flags.device.type == "cuda":
            host = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._pending = host, event, description
        else:
            self._pending = flags, None, description
        return before

    def read(self) -> tuple[list[bool], T] | None:
        """Return the flags that are not read yet, None if there are none; wait for the device if it is not there."""
        if self._pending is None:
            return None
        (flags, event, description), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        return flags.tolist(), description
