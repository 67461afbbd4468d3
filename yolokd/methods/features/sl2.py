"""SL2, score-weighted L2: the loss that Ultralytics ships as `distill_model`."""

from __future__ import annotations

from torch import Tensor, nn

from yolokd.methods.base import Level, LevelShape, Method, register
from yolokd.pyramid.squared_error import squared_error


@register("sl2")
class SL2(Method):
    """Weight the feature error at each position by the teacher's top class probability there.

    Source: https://docs.ultralytics.com/guides/knowledge-distillation

        L = Σ_hw s_hw Σ_c (F_T − F_S)² / (C · Σ_hw s_hw)

    F_T: the teacher's map. F_S: the student's map after a projector, 1x1-ReLU-1x1. s_hw: the highest of the teacher's
    probabilities of the shared classes; of an end-to-end teacher, from the mean of both branches' logits. C: channels
    of F_T. The sums over positions also run over the batch.

    Ours: only the shared classes count. Ultralytics takes all of the teacher's classes, so the two differ if the data
    set lacks some of them.
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
        """Return the loss of one level, a float32 scalar."""
        score = top_score(level)
        error = squared_error(self.project(level.student), level.teacher)
        return (score * error).sum() / (score.sum() + 1e-9)  # Ultralytics' constant, against division by zero


def top_score(level: Level) -> Tensor:
    """Return s, the teacher's top class probability at each position, (B, H, W) float32."""
    assert level.teacher_mean_logits is not None
    return level.teacher_mean_logits.float().amax(1).sigmoid()
