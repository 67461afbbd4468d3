"""CWD, channel-wise distillation (Shu et al., ICCV 2021)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted, recomputed


@register("cwd")
class CWD(Method):
    """Compare each channel of the feature maps as a distribution over positions.

    Paper: Shu et al., ICCV 2021, https://arxiv.org/abs/2011.13256

        L = τ² · Σ_hw P_T · log(P_T / P_S), averaged over batch and channels
        P = softmax over positions of F / τ

    P_T, P_S: P of the teacher's map F_T and of the adapted student map F_S. The sum runs over positions.

    tau: the paper's τ, the temperature of the softmax.

    Ours: the adapter is a 1x1 convolution. The authors' code for segmentation has batch normalization and a ReLU behind
    it; MMRazor's for detection has no adapter, since its models have the same channels.
    """

    paper = "CWD: channel-wise distillation, Shu et al., ICCV 2021"

    def __init__(self, shape: LevelShape, *, tau: Annotated[float, Field(gt=0, allow_inf_nan=False)]) -> None:
        super().__init__()
        self.tau = tau
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        return self.tau**2 * recomputed(self._divergence, adapted(self.adapt, level), level.teacher)

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_student, log_teacher = ((maps.float() / self.tau).flatten(2).log_softmax(2) for maps in (student, teacher))
        divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return divergence / (teacher.shape[0] * teacher.shape[1])
