"""Building blocks that several methods use: adapters, generators, attention maps, distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from yolokd.pyramid.level import Level, LevelShape
from yolokd.pyramid.squared_error import in_half_precision, squared_error

Hidden = Annotated[float, Field(gt=0, le=1)]  # the width of a generator's hidden layer, see `generator`
EPS = 1e-6  # ours: added to a variance, so that a constant channel is standardized to 0; see PKD


class ChannelAdapter(nn.Conv2d):
    """A 1x1 convolution from a student's channels to a teacher's: (B, C_S, H, W) -> (B, C_T, H, W).

    Ours: a method has its adapters also where both models have the same channels. The released code of FGD, MGD and PKD
    has none there; with adapter=identity_if_equal, yolokd replaces such adapters by an `nn.Identity`.
    """

    def __init__(self, student_channels: int, teacher_channels: int) -> None:
        super().__init__(student_channels, teacher_channels, kernel_size=1)


class Adapter(ChannelAdapter):
    """Brings a level's neck map to the teacher's channels.

    In a composition of methods such as `fitnet+pdf`, the methods of one level share their first adapter if its shape is
    the same.
    """

    def __init__(self, shape: LevelShape) -> None:
        super().__init__(shape.student_channels, shape.teacher_channels)


def adapted(adapt: nn.Module, level: Level) -> Tensor:
    """Return F_S, the adapted student map, (B, C_T, H, W): computed once per step for all that share the adapter."""
    return level.compute_once(adapt, lambda: adapt(level.student))


def adapted_error(adapt: nn.Module, level: Level) -> Tensor:
    """Return the mean over channels of (F_T − F_S)², (B, H, W) float32: computed once per step, like `adapted`."""
    return level.compute_once((adapt, "error"), lambda: squared_error(adapted(adapt, level), level.teacher))


def generator(channels: int, hidden: float = 1.0) -> nn.Sequential:
    """Return the generator of MGD, 3x3-ReLU-3x3: (B, C, H, W) -> (B, C, H, W).

    hidden: the number of channels between the two convolutions, as a fraction of C; 1 is MGD's. Ours: a smaller one;
    the time of both convolutions falls in proportion to it.
    """
    between = max(round(hidden * channels), 1)
    return nn.Sequential(
        nn.Conv2d(channels, between, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(between, channels, kernel_size=3, padding=1),
    )


def generated(generate: nn.Sequential, adapt: nn.Module, maps: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return generate(kept · adapt(maps)), (B, C_T, H, W), of the student's maps, (B, C_S, H, W).

    kept: (B, 1, H, W), 0 or 1 at each position; None keeps all.

    The adapter and the generator's first convolution are linear. So they are one 3x3 convolution, whose weight is the
    product of theirs: it has C_S input channels instead of C_T, and costs that much less. The adapter's bias goes
    through a convolution of its own, because `kept` and the padding take it away at some positions. An identity in the
    adapter's place leaves the generator alone.
    """
    output: Tensor
    if isinstance(adapt, nn.Identity):
        output = generate(maps if kept is None else maps * kept)
        return output
    first = generate[0]
    assert isinstance(first, nn.Conv2d)
    assert isinstance(adapt, Adapter)
    weight = torch.einsum("othw,ts->oshw", first.weight, adapt.weight[:, :, 0, 0])
    bias = torch.einsum("othw,t->ohw", first.weight, adapt.bias)[:, None]
    if kept is None:
        kept = maps.new_ones(1, 1, *maps.shape[2:])
    else:
        maps = maps * kept
    hidden = F.conv2d(maps, weight, first.bias, padding=1) + F.conv2d(kept, bias, padding=1)
    output = generate[1:](hidden)
    return output


def spatial_attention(maps: Tensor, temperature: float = 1.0) -> Tensor:
    """Return A(F) = H·W·softmax over positions of mean_c |F| / T.

    (B, C, H, W) -> (B, H, W) float32, of mean 1 in each image.
    """
    b, _, h, w = maps.shape
    return ((mean_magnitude(maps, 1) / temperature).flatten(1).softmax(1) * (h * w)).view(b, h, w)


def channel_attention(maps: Tensor, temperature: float) -> Tensor:
    """Return A(F) = C·softmax over channels of mean_hw |F| / T.

    (B, C, H, W) -> (B, C) float32, of mean 1 in each image.
    """
    return (mean_magnitude(maps, (2, 3)) / temperature).softmax(1) * maps.shape[1]


def mean_magnitude(maps: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Return the mean of |F| over dimensions of F, in float32; maps in half precision are not copied to float32."""
    if in_half_precision(maps):
        sums: Tensor = torch.linalg.vector_norm(maps, ord=1, dim=dims, dtype=torch.float32)
        return sums * (sums.numel() / maps.numel())
    return maps.float().abs().mean(dims)


def recomputed(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """Return function(*maps), which computes in float32.

    For maps in half precision the backward pass computes the function once more, so that no map in float32 is kept
    until then; for others it reads what the first computation kept.
    """
    if not in_half_precision(*maps):
        return function(*maps)
    output: Tensor = checkpoint(function, *maps, use_reentrant=False, preserve_rng_state=False)
    return output


def standardized(maps: Tensor) -> Tensor:
    """Return maps whose channels have mean 0 and variance 1 over batch and positions, (B, C, H, W) float32."""
    maps = maps.float()
    return (maps - maps.mean((0, 2, 3), keepdim=True)) / (maps.var((0, 2, 3), correction=0, keepdim=True) + EPS).sqrt()


def standardized_error(maps: Tensor, teacher: Tensor) -> Tensor:
    """Return half the mean squared error of the standardized (B, C, H, W) maps and teacher's map, a float32 scalar.

    It equals 1 − Pearson's r, averaged over channels.
    """
    return recomputed(lambda s, t: F.mse_loss(standardized(s), standardized(t)) / 2, maps, teacher)
