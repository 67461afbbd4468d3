"""DFMSD, dual feature masking stage-wise distillation (Zhang et al., 2024)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, Hidden, adapted, generated, generator, mean_magnitude, standardized_error

Fraction = Annotated[float, Field(ge=0, lt=1)]
MAX_MASKED = 0.95  # ours: the largest fraction of positions that may be masked


@register("dfmsd")
class DFMSD(Method):
    """Rebuild the teacher's map from the student's map, which is zeroed where the teacher's attention is highest.

    Paper: Zhang et al., 2024, https://arxiv.org/abs/2407.13147

        L = Σ (N(F_T) − N(R))² / (2·C·H·W), averaged over the batch
        R = w_1 · G_S(F_S ⊙ M^S) + w_2 · G_C(F_S ⊙ M^C)

    F_T: the teacher's map. F_S: the adapted student map. M^S: 0 at the fraction ρ_s of positions where mean_c |F_T| is
    highest, else 1. M^C: 0 at the fraction ρ_c of channels where mean_hw |F_T| is highest, else 1. G_S, G_C:
    generators, 3x3-ReLU-3x3. w_1, w_2: the softmax of two learned numbers. N: standardizes each channel over batch and
    positions, as in PKD (semantic alignment). C, H, W: channels, height and width of F_T.

    Several teachers work in stages, the weakest first. At stage k, counted from 0, M^S is also 0 at those positions
    inside labelled boxes that are among the fraction ρ_s·(1 + k·δ) of highest attention (masking enhancement).

    An image without labels is masked as one without objects.

    rho_s, rho_c: ρ_s and ρ_c. delta: δ, the growth per stage. hidden: the channels between the convolutions of G_S and
    G_C, as a fraction of the teacher's, see `generator`.

    Ours: we had only the paper's abstract, and found no code. The abstract names two masks by attention, stages,
    stronger masking of objects, and semantic alignment. All else is our reading: that the positions and channels of
    highest attention are masked, and not those of lowest; the attention itself; the generators and their sum; N; the
    adapter; how ρ_s grows; the values of all constants; the largest fraction MAX_MASKED.
    """

    paper = "DFMSD: dual masking, stage-wise, Zhang et al., 2024"

    def __init__(
        self,
        shape: LevelShape,
        *,
        rho_s: Fraction,
        rho_c: Fraction,
        delta: Annotated[float, Field(ge=0, le=10)],
        hidden: Hidden,
    ) -> None:
        super().__init__()
        self.rho_s, self.rho_c = rho_s, rho_c
        self.rho_inside = max(rho_s, min(rho_s * (1 + shape.stage * delta), MAX_MASKED))
        self.adapt = Adapter(shape)
        self.by_position = generator(shape.teacher_channels, hidden)
        self.by_channel = generator(shape.teacher_channels, hidden)
        self.mix = nn.Parameter(torch.zeros(2))

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        student = adapted(self.adapt, level)
        positions, channels = (mask.to(student.dtype) for mask in self.masks(level))
        weights = self.mix.softmax(0)
        by_position = generated(self.by_position, self.adapt, level.student, positions)
        rebuilt = weights[0] * by_position + weights[1] * self.by_channel(student * channels)
        return standardized_error(rebuilt, level.teacher)

    def masks(self, level: Level) -> tuple[Tensor, Tensor]:
        """Return M^S, (B, 1, H, W), and M^C, (B, C, 1, 1), boolean: False where the student's map is zeroed."""
        attention = mean_magnitude(level.teacher, 1)
        position_ranks = rank(attention.flatten(1)).view_as(attention)
        count = position_ranks[0].numel()
        masked = position_ranks < round(self.rho_s * count)
        if self.rho_inside > self.rho_s:
            masked |= (position_ranks < round(self.rho_inside * count)) & (level.inverse_areas() > 0)
        channel_ranks = rank(mean_magnitude(level.teacher, (2, 3)))
        return ~masked[:, None], (channel_ranks >= round(self.rho_c * channel_ranks.shape[1]))[:, :, None, None]


def rank(values: Tensor) -> Tensor:
    """Return each value's rank in its row, (B, N) -> (B, N): 0 is the highest; equal values keep their order."""
    order = values.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1)  # the inverse permutation; a scatter makes the host wait for a GPU
