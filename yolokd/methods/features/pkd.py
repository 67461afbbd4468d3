"""PKD, distillation by Pearson correlation (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted, standardized_error


@register("pkd")
class PKD(Method):
    """Compare the feature maps by the correlation of their channels, so that neither mean nor scale counts.

    Paper: Cao et al., NeurIPS 2022, https://arxiv.org/abs/2207.02039

        L = Σ (N(F_T) − N(F_S))² / (2·C·H·W), averaged over the batch

    F_T: the teacher's map. F_S: the adapted student map. N: standardizes each channel over batch and positions. C, H,
    W: channels, height and width of F_T. L equals 1 − r, where r is Pearson's correlation of a channel's values in
    both maps, averaged over channels.

    Ours: N divides by √(variance + ε) with ε = 1e-6, because a constant channel has no correlation. Such a channel is
    standardized to 0, and one whose standard deviation is near 1e-3 counts less. The released code adds 1e-6 to the
    standard deviation instead, so that this begins only near 1e-6. It also divides by n − 1 for the variance of n
    values, so that its loss is (n − 1)/n of ours. The adapter is also there where both models have the same channels;
    the released code has none.
    """

    paper = "PKD: Pearson correlation, Cao et al., NeurIPS 2022"

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        return standardized_error(adapted(self.adapt, level), level.teacher)
