"""Pieces that the papers share: adapters, generators, attention maps, distances."""

from __future__ import annotations

from torch import Tensor, nn

from yolokd.pyramid import LevelShape


def adapter(shape: LevelShape) -> nn.Module:
    """1x1 convolution from the student's channels to the teacher's: (B, C_S, H, W) -> (B, C_T, H, W)."""
    return nn.Conv2d(shape.student_channels, shape.teacher_channels, kernel_size=1)


def generator(channels: int) -> nn.Module:
    """3x3-ReLU-3x3 at constant width, as masked generative distillation rebuilds maps."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )


def spatial_attention(maps: Tensor) -> Tensor:
    """A(F) = H·W·softmax over positions of mean_c |F|: (B, C, H, W) -> (B, H, W), float32, mean 1 per image."""
    b, _, h, w = maps.shape
    return (maps.float().abs().mean(1).flatten(1).softmax(1) * (h * w)).view(b, h, w)


def squared_error(a: Tensor, b: Tensor) -> Tensor:
    """Mean over channels of (a − b)²: two (B, C, H, W) -> (B, H, W), float32."""
    return (a.float() - b.float()).square().mean(1)
