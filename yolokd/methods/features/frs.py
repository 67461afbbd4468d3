"""FRS, feature richness score (Du et al., NeurIPS 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, adapted_error

MIN_RICHNESS = 1e-9  # ours: Σ S is at least this, so that a batch without any richness gives no division by zero


@register("frs")
class FRS(Method):
    """Compare feature maps and class scores where the teacher is confident, inside labelled boxes or outside.

    Paper: Du et al., NeurIPS 2021, https://arxiv.org/abs/2111.00674

        L = α · Σ S·(F_T − F_S)² / Σ S + β · Σ S·BCE(z_S, p_T) / Σ S
        S = max_c p_T, the richness of a position

    F_T: the teacher's map. F_S: the adapted student map. p_T: the teacher's class probabilities. z_S: the student's
    class logits. BCE: binary cross-entropy. The squared error is averaged over channels, the cross-entropy is summed
    over the shared classes, and Σ runs over positions and batch. S carries no gradient.

    alpha, beta: the paper's α and β, the weights of the feature loss and of the class loss.

    The released code lets both terms rise from 0 over the first steps; here `frs.warmup` does so.

    Ours: the squared error is averaged over channels, where the released code sums it. The adapter is a 1x1
    convolution, where that code has a 3x3 one. Of an end-to-end student, z_S are the logits of its one-to-many head.
    The class loss does not teach its one-to-one head, which predicts after training: in training that head's gradients
    do not reach the maps that both heads share.
    """

    paper = "FRS: feature richness score, Du et al., NeurIPS 2021"
    wants_logits = True

    def __init__(self, shape: LevelShape, *, alpha: Weight, beta: Weight) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        assert level.teacher_logits is not None
        assert level.student_logits is not None
        probabilities = level.teacher_logits.float().sigmoid()
        score = richness(probabilities)
        weights = score / score.sum().clamp(min=MIN_RICHNESS)
        scores = F.binary_cross_entropy_with_logits(level.student_logits.float(), probabilities, reduction="none")
        return (weights * (self.alpha * adapted_error(self.adapt, level) + self.beta * scores.sum(1))).sum()


def richness(probabilities: Tensor) -> Tensor:
    """Return S = max_c p_T, (B, H, W), of the teacher's class probabilities, (B, K, H, W)."""
    return probabilities.amax(1)
