"""CWD, channel-wise distillation (Shu et al., ICCV 2021)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted


@register("cwd")
class CWD(Method):
    """Each channel as a distribution over positions: L = τ² · Σ_hw P_T · log(P_T / P_S), P = softmax over positions.

    P is taken of F / τ; the sum runs over positions, the mean over batch and channels. F_S is the adapted student map.
    """

    paper = "CWD: channel-wise distillation, Shu et al., ICCV 2021"

    def __init__(self, shape: LevelShape, *, tau: Annotated[float, Field(gt=0, allow_inf_nan=False)]) -> None:
        super().__init__()
        self.tau = tau
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        student, teacher = (
            (maps.float() / self.tau).flatten(2).log_softmax(2) for maps in (adapted(self.adapt, level), level.teacher)
        )
        divergence = F.kl_div(student, teacher, reduction="sum", log_target=True)
        return self.tau**2 * divergence / (teacher.shape[0] * teacher.shape[1])
