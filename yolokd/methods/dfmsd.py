"""DFMSD, dual feature masking stage-wise distillation (Zhang et al., 2024)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted, generator, standardized_error

Share = Annotated[float, Field(ge=0, lt=1)]
MAX_MASKED = 0.95  # ours: the share of positions that may be masked at most


@register("dfmsd")
class DFMSD(Method):
    """The student's map, zeroed where the teacher attends most, must give the teacher's map back; two maskings at once.

    M^S zeroes the share ρ_s of positions where the teacher's spatial attention mean_c |F_T| is highest, M^C the share
    ρ_c of channels where mean_hw |F_T| is. Two generators rebuild G_S(F_S ⊙ M^S) and G_C(F_S ⊙ M^C), learned softmax
    weights fuse them into R, and L is half the mean squared error of R and F_T, each channel standardized over batch
    and positions (semantic alignment, as in PKD). F_S is the adapted student map.

    Stage-wise: with several teachers, weakest first, a position inside a labelled box is masked at stage k where it is
    among the ρ_s·(1 + k·δ) most attended (masking enhancement). Constants are ours: we had its abstract alone.
    """

    paper = "DFMSD: dual masking, stage-wise, Zhang et al., 2024"

    def __init__(
        self, shape: LevelShape, *, rho_s: Share, rho_c: Share, delta: Annotated[float, Field(ge=0, le=10)]
    ) -> None:
        super().__init__()
        self.rho_s, self.rho_c = rho_s, rho_c
        self.rho_inside = max(rho_s, min(rho_s * (1 + shape.stage * delta), MAX_MASKED))
        self.adapt = Adapter(shape)
        self.by_position = generator(shape.teacher_channels)
        self.by_channel = generator(shape.teacher_channels)
        self.mix = nn.Parameter(torch.zeros(2))

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        student = adapted(self.adapt, level)
        positions, channels = (mask.to(student.dtype) for mask in self.masks(level))
        weights = self.mix.softmax(0)
        rebuilt = weights[0] * self.by_position(student * positions) + weights[1] * self.by_channel(student * channels)
        return standardized_error(rebuilt, level)

    def masks(self, level: Level) -> tuple[Tensor, Tensor]:
        """M^S (B, 1, H, W) and M^C (B, C, 1, 1), boolean, False where zeroed."""
        attention = level.teacher.float().abs()
        place = rank(attention.mean(1).flatten(1)).view_as(attention[:, 0])
        count = place[0].numel()
        masked = place < round(self.rho_s * count)
        if self.rho_inside > self.rho_s:
            masked |= (place < round(self.rho_inside * count)) & (level.inverse_areas() > 0)
        channels = rank(attention.mean((2, 3)))
        return ~masked[:, None], (channels >= round(self.rho_c * channels.shape[1]))[:, :, None, None]


def rank(values: Tensor) -> Tensor:
    """(B, N) -> (B, N) each value's place in its row, 0 for the highest; ties go to the first."""
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, places)
