"""SL2, score-weighted L2: the loss that Ultralytics ships as `distill_model`."""

from __future__ import annotations

from torch import Tensor, nn

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.methods.blocks import squared_error


@register("sl2")
class SL2(Method):
    """Weights the feature error at each position with the teacher's top class probability there.

    With s_hw = max over the shared classes of the teacher's class probability,
    L = Σ_hw s_hw Σ_c (F_T − F_S)² / (C · Σ_hw s_hw), both sums over the batch too. F_S is the student's map after
    1x1-ReLU-1x1. The logits of an end-to-end teacher are the mean of its two branches'. Ultralytics' own takes all of
    the teacher's classes, so it differs where the data set does not have them all.
    """

    paper = "Score-weighted L2, Ultralytics' own distill_model"
    wants_mean_logits = True

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()
        self.project = nn.Sequential(
            nn.Conv2d(shape.student_channels, shape.teacher_channels, kernel_size=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(shape.teacher_channels, shape.teacher_channels, kernel_size=1),
        )

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        score = top_score(level)
        error = squared_error(self.project(level.student), level.teacher)
        return (score * error).sum() / (score.sum() + 1e-9)  # Ultralytics' guard


def top_score(level: Level) -> Tensor:
    """The teacher's top class probability: (B, H, W) float32."""
    assert level.teacher_mean_logits is not None
    return level.teacher_mean_logits.float().amax(1).sigmoid()
