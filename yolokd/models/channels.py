"""Image channels: which of a data set's channels a teacher sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yolokd.errors import UserError


def seen_channels(own: int, channels: int, chosen: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return which channels of images a teacher sees, in its own order, counted from 0; None: all, as they are.

    own, channels: the numbers of the teacher's channels and of the images'. chosen: what the user gives, counted from
    1; if it is None, an only channel is seen again and again. Raises UserError if they do not fit.

    >>> seen_channels(3, 1, None), seen_channels(3, 8, [4, 3, 2])
    ((0, 0, 0), (3, 2, 1))
    """
    if chosen is not None:
        if len(chosen) != own or max(chosen) > channels:
            cure = f"give {own} numbers from 1 to {channels}"
            raise UserError(f"teacher_channels={list(chosen)}", "does not fit the teacher and the data", cure)
        return tuple(channel - 1 for channel in chosen)
    if channels == own:
        return None
    if channels == 1:
        return (0,) * own
    problem = f"takes {own} channels, the data {channels}"
    raise UserError("teacher", problem, f"say which it sees, for example teacher_channels={[*range(own, 0, -1)]}")


def select_channels(images: Tensor, channels: Sequence[int] | None) -> Tensor:
    """Return (B, C, H, W) images with these channels, counted from 0; None: as they are."""
    if channels is None:
        return images
    # Slices, because an index would be a copy to the device, which no CUDA graph can hold.
    return torch.cat([images[:, channel : channel + 1] for channel in channels], 1)
