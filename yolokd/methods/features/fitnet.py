"""FitNets, hints (Romero et al., ICLR 2015): the plain feature distance that the others are measured against."""

from __future__ import annotations

from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted_error


@register("fitnet")
class FitNet(Method):
    """Compare the feature maps position by position, by their mean squared error.

    Paper: Romero et al., ICLR 2015, https://arxiv.org/abs/1412.6550

        L = Σ (F_T − F_S)² / (C·H·W), averaged over the batch

    F_T: the teacher's map. F_S: the adapted student map. C, H, W: channels, height and width of F_T.

    Ours: the distance is taken at every paired level; the paper has one hint layer.
    """

    paper = "FitNets, Romero et al., ICLR 2015"

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        return adapted_error(self.adapt, level).mean()
