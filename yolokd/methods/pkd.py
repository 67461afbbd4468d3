"""PKD, distillation by Pearson correlation (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted, standardized


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
        teacher = level.once("standardized teacher", lambda: standardized(level.teacher))
        return F.mse_loss(standardized(adapted(self.adapt, level)), teacher) / 2
