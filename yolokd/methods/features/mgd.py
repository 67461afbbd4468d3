"""MGD, masked generative distillation (Yang et al., ECCV 2022)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import Adapter, Hidden, generated, generator
from yolokd.pyramid.squared_error import mean_squared_error


@register("mgd")
class MGD(Method):
    """Rebuild the teacher's map from the student's map, which is zeroed at random positions.

    Paper: Yang et al., ECCV 2022, https://arxiv.org/abs/2205.01529

        L = Σ (F_T − G(M ⊙ F_S))² / (C·H·W), averaged over the batch

    F_T: the teacher's map. F_S: the adapted student map. M: the mask, 0 or 1 at each position, drawn anew for each
    image and step. G: the generator, 3x3-ReLU-3x3. C, H, W: channels, height and width of F_T.

    lambda_: the paper's λ, the probability that M is 0 at a position.
    hidden: the channels between G's convolutions, as a fraction of the teacher's; 1 is the paper's, see `generator`.

    Ours: a mean over channels and positions, where the paper has a sum. The adapter is also there where both models
    have the same channels; the released code then has none.
    """

    paper = "MGD: masked generative distillation, Yang et al., ECCV 2022"

    def __init__(self, shape: LevelShape, *, lambda_: Annotated[float, Field(ge=0, lt=1)], hidden: Hidden) -> None:
        super().__init__()
        self.lambda_ = lambda_
        self.adapt = Adapter(shape)
        self.generate = generator(shape.teacher_channels, hidden)

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        kept = self.draw_mask(level).to(level.student.dtype)
        return mean_squared_error(generated(self.generate, self.adapt, level.student, kept), level.teacher)

    def draw_mask(self, level: Level) -> Tensor:
        """Return M of one step, (B, 1, H, W) boolean: False where the student's map is zeroed."""
        b, _, h, w = level.student.shape
        return level.draw_uniform(b, 1, h, w) >= self.lambda_
