"""DFD, distilling the feature disparity differently (Liu et al., ICML 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import (
    Adapter,
    Hidden,
    adapted,
    adapted_error,
    generated,
    generator,
    spatial_attention,
)
from yolokd.pyramid.squared_error import squared_error

Regions = Literal["both", "high", "low"]
Constraint = Literal["mixed", "plain", "transformed", "swapped", "low_both"]
Width = Literal["student", "teacher"]

# The errors that are added up in the regions of high and of low disparity: True for one through f_trans.
ERRORS: dict[Constraint, tuple[tuple[bool, ...], tuple[bool, ...]]] = {
    "mixed": ((True,), (False,)),
    "plain": ((False,), (False,)),
    "transformed": ((True,), (True,)),
    "swapped": ((False,), (True,)),
    "low_both": ((True,), (True, False)),
}


@register("dfd")
class DFD(Method):
    """Split the positions by how much the two models' spatial attention differs there, and treat both regions apart.

    Paper: Liu et al., ICML 2024, https://proceedings.mlr.press/v235/liu24cd.html

        L = α·L_HD + β·L_LD, averaged over the batch
        L_HD = Σ (F_T − f_trans(F_S))² / (C·H·W) over the positions of high disparity, D ≥ P
        L_LD = Σ (F_T − F_S)² / (C·H·W) over the positions of low disparity, D < P
        D = |A(F_T) − A(F_S)|, the disparity
        A(F) = H·W·softmax over positions of mean_c |F|, the spatial attention

    F_T: the teacher's map. F_S: the adapted student map. P: the mean of D over the map. f_trans: a small trained
    transformation. C, H, W: channels, height and width of F_T. D and the split carry no gradient.

    alpha, beta: the paper's α and β, the weights of the regions of high and of low disparity.
    regions: `both` (the method), `high` or `low`: the ablation of the paper's Table 1.
    constraint: which regions are compared through f_trans, the ablation of the paper's Table 5. `mixed`: the high ones
    (the method). `plain`: none. `transformed`: both. `swapped`: the low ones. `low_both`: both, and the low ones also
    without it, the table's row "TF | TF+MSE".
    width: where f_trans works. `teacher`: after the adapter, at the teacher's width, like the generator of MGD.
    `student` (ours): before the adapter, at the student's width, which costs a small fraction of that.
    hidden: the channels between the convolutions of f_trans, as a fraction of those where it works, see `generator`.

    With α = β = 1, `plain` is FitNet's loss: the split changes nothing then. To reproduce Table 1 (`regions`; α and β
    apart, with `plain` and with `mixed`) and Table 5 (`constraint`), give balance=off and dfd.schedule=constant, as in
    the paper. With balanced gains every variant pulls equally hard, and of α and β only the ratio counts.

    Ours, because the paper leaves it open and no code was released: A(F_S) is taken of the adapted map. P is the mean
    over each image by itself, not over the batch. f_trans is 3x3-ReLU-3x3, like MGD's generator; the paper's figure
    gives no sizes. The row "TF | TF+MSE" is read as high | low regions, with the two errors of the low ones added up.
    The student's map is adapted also where both models have the same channels.
    """

    paper = "DFD: distilling the feature disparity differently, Liu et al., ICML 2024"

    def __init__(
        self,
        shape: LevelShape,
        *,
        alpha: Weight,
        beta: Weight,
        regions: Regions,
        constraint: Constraint,
        width: Width,
        hidden: Hidden,
    ) -> None:
        super().__init__()
        self.alpha = alpha if regions != "low" else 0.0
        self.beta = beta if regions != "high" else 0.0
        self.high, self.low = ERRORS[constraint]
        self.adapt = Adapter(shape)
        self.after_adapter = width == "teacher"
        channels = shape.teacher_channels if self.after_adapter else shape.student_channels
        self.transform = generator(channels, hidden) if any(self.high + self.low) else None

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        high = high_disparity(level.teacher, adapted(self.adapt, level))
        loss = level.teacher.new_zeros((), dtype=torch.float32)
        terms = [(self.alpha, high, transform) for transform in self.high]
        terms += [(self.beta, ~high, transform) for transform in self.low]
        for weight, region, transform in terms:
            if weight:
                error = self._transformed_error(level) if transform else adapted_error(self.adapt, level)
                loss = loss + weight * error.where(region, 0).mean()
        return loss

    def _transformed_error(self, level: Level) -> Tensor:
        """Return the mean over channels of (F_T − f_trans(F_S))², (B, H, W) float32."""
        return level.compute_once((self, "transformed"), lambda: squared_error(self._transformed(level), level.teacher))

    def _transformed(self, level: Level) -> Tensor:
        """Return f_trans(F_S), (B, C_T, H, W)."""
        assert self.transform is not None
        transformed: Tensor
        if self.after_adapter:
            transformed = generated(self.transform, self.adapt, level.student)
        else:
            transformed = self.adapt(self.transform(level.student))
        return transformed


def disparity(teacher: Tensor, student: Tensor) -> Tensor:
    """Return D = |A(F_T) − A(F_S)| of two maps (B, C, H, W): (B, H, W) float32; no gradient."""
    return (spatial_attention(teacher) - spatial_attention(student.detach())).abs()


def above_mean(disparity: Tensor) -> Tensor:
    """Return (B, H, W) boolean: True where the disparity D is at least P, its mean over the map."""
    return disparity >= disparity.mean((1, 2), keepdim=True)


def high_disparity(teacher: Tensor, student: Tensor) -> Tensor:
    """Return the positions of high disparity of two maps (B, C, H, W): (B, H, W) boolean; no gradient."""
    return above_mean(disparity(teacher, student))
