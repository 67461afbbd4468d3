"""FitNets, hints (Romero et al., ICLR 2015): the plain feature distance that the others are measured against."""

from __future__ import annotations

from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted_error


@register("fitnet")
class FitNet(Method):
    """Mean squared error: L = Σ (F_T − F_S)² / (C·H·W), meaned over the batch. F_S is the adapted student map."""

    paper = "FitNets, Romero et al., ICLR 2015"

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        return adapted_error(self.adapt, level).mean()
