"""FRS, feature richness score (Du et al., NeurIPS 2021)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, adapted_error

EMPTY = 1e-9  # ours: the richness of a batch under which there is nothing to distil


@register("frs")
class FRS(Method):
    """Distils maps and class scores where the teacher sees something, in a labelled box or not.

    With richness S = max_c σ(teacher's logit) at each position,
    L = α · Σ S·(F_T − F_S)² / Σ S + β · Σ S·BCE(student's logit, teacher's probability) / Σ S, the squared error
    meaned over channels, the cross-entropy summed over the shared classes, the sums over positions and batch. F_S is
    the adapted student map; S carries no gradient. Its released code ramps both in: `frs.warmup`.
    """

    paper = "FRS: feature richness score, Du et al., NeurIPS 2021"
    wants_logits = True

    def __init__(self, shape: LevelShape, *, alpha: Weight, beta: Weight) -> None:
        super().__init__()
        self.alpha, self.beta = alpha, beta
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        assert level.teacher_logits is not None
        assert level.student_logits is not None
        probabilities = level.teacher_logits.float().sigmoid()
        richness = probabilities.amax(1)
        weights = richness / richness.sum().clamp(min=EMPTY)
        scores = F.binary_cross_entropy_with_logits(level.student_logits.float(), probabilities, reduction="none")
        return (weights * (self.alpha * adapted_error(self.adapt, level) + self.beta * scores.sum(1))).sum()
