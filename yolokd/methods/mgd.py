"""MGD, masked generative distillation (Yang et al., ECCV 2022)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, adapted, generator


@register("mgd")
class MGD(Method):
    """The student's map, zeroed at random positions, must give the teacher's whole map through a generator.

    L = Σ (F_T − G(M ⊙ F_S))² / (C·H·W), meaned over the batch; M is 0 at a share λ of positions, drawn anew for each
    image and step, G is 3x3-ReLU-3x3, and F_S is the adapted student map.
    """

    paper = "MGD: masked generative distillation, Yang et al., ECCV 2022"

    def __init__(self, shape: LevelShape, *, lambda_: Annotated[float, Field(ge=0, lt=1)]) -> None:
        super().__init__()
        self.masked = lambda_
        self.adapt = Adapter(shape)
        self.generate = generator(shape.teacher_channels)

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        student = adapted(self.adapt, level)
        kept = self.kept(level).to(student.dtype)
        return F.mse_loss(self.generate(student * kept).float(), level.teacher.float())

    def kept(self, level: Level) -> Tensor:
        """M: (B, 1, H, W) boolean."""
        b, _, h, w = level.student.shape
        return level.uniform(b, 1, h, w) >= self.masked
