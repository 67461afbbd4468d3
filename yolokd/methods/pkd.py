"""PKD, distillation by Pearson correlation (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted, standardized_error


@register("pkd")
class PKD(Method):
    """Half the mean squared error of both maps, each channel standardized over batch and positions.

    That is 1 − r, r being Pearson's correlation of a channel's values, meaned over channels. F_S is the adapted
    student map.
    """

    paper = "PKD: Pearson correlation, Cao et al., NeurIPS 2022"

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        return standardized_error(adapted(self.adapt, level), level)
