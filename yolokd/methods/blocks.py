"""Pieces that the papers share: adapters, generators, attention maps, distances."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from yolokd.pyramid.level import Level, LevelShape

EPS = 1e-6  # ours: a channel of one value stays at 0


class Adapter(nn.Conv2d):
    """1x1 convolution from the student's channels to the teacher's: (B, C_S, H, W) -> (B, C_T, H, W).

    Composed methods of one level share their first, where it is of equal shape.
    """

    def __init__(self, shape: LevelShape) -> None:
        super().__init__(shape.student_channels, shape.teacher_channels, kernel_size=1)


def adapted(adapt: nn.Module, level: Level) -> Tensor:
    """The student's map at the teacher's channels, computed once a step for all methods that share the adapter."""
    return level.once(adapt, lambda: adapt(level.student))


def adapted_error(adapt: nn.Module, level: Level) -> Tensor:
    """Mean over channels of (F_T − F_S)², F_S adapted: (B, H, W) float32, computed once a step like `adapted`."""
    return level.once((adapt, "error"), lambda: squared_error(adapted(adapt, level), level.teacher))


def generator(channels: int) -> nn.Module:
    """3x3-ReLU-3x3 at constant width, as masked generative distillation rebuilds maps."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )


def spatial_attention(maps: Tensor, temperature: float = 1.0) -> Tensor:
    """A(F) = H·W·softmax over positions of mean_c |F| / T: (B, C, H, W) -> (B, H, W), float32, mean 1 per image."""
    b, _, h, w = maps.shape
    return ((maps.float().abs().mean(1) / temperature).flatten(1).softmax(1) * (h * w)).view(b, h, w)


def channel_attention(maps: Tensor, temperature: float) -> Tensor:
    """A(F) = C·softmax over channels of mean_hw |F| / T: (B, C, H, W) -> (B, C), float32, mean 1 per image."""
    return (maps.float().abs().mean((2, 3)) / temperature).softmax(1) * maps.shape[1]


def standardized(maps: Tensor) -> Tensor:
    """Each channel at mean 0 and variance 1 over batch and positions: (B, C, H, W) -> the same, float32."""
    maps = maps.float()
    return (maps - maps.mean((0, 2, 3), keepdim=True)) / (maps.var((0, 2, 3), correction=0, keepdim=True) + EPS).sqrt()


def standardized_error(maps: Tensor, level: Level) -> Tensor:
    """Half the mean squared error of both maps standardized, 1 − Pearson's r; the teacher's computed once a step."""
    teacher = level.once("standardized teacher", lambda: standardized(level.teacher))
    return F.mse_loss(standardized(maps), teacher) / 2


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over channels of (a − b)²: two (B, C, H, W) -> (B, H, W), float32."""
    return F.mse_loss(a.float(), b.float(), reduction="none").mean(1)
