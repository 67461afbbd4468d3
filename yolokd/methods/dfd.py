"""DFD, disparity-aware feature distillation (Liu et al., ICML 2024)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, adapted, adapted_error, generator, spatial_attention, squared_error

Regions = Literal["both", "high", "low"]
Constraint = Literal["mixed", "plain", "transformed", "swapped"]
Width = Literal["student", "teacher"]


@register("dfd")
class DFD(Method):
    """Splits a level where the spatial attention of the two models differs much or little, and treats both apart.

    With A(F) = H·W·softmax(mean_c |F|), disparity D = |A(F_T) − A(F_S)| and threshold P = mean of D over the map:
    L = α·L_HD + β·L_LD, L_LD = Σ (F_T − F_S)² where D < P, L_HD = Σ (F_T − f_trans(F_S))² where D ≥ P, both over C·H·W
    and meaned over the batch. F_S is the adapted student map; D and the split carry no gradient.

    regions: the paper's Table 1 ablation (both, high or low regions only).
    constraint: the paper's Table 5, which regions compare through f_trans: `mixed` the high ones (the method itself),
    `plain` none, `transformed` both, `swapped` the low ones.
    width: where f_trans works: on the adapted map at the `teacher`'s width, as masked generative distillation does, or
    (ours) before the adapter at the `student`'s, which costs a small fraction of that.
    """

    paper = "Disparity-aware feature distillation, Liu et al., ICML 2024"

    def __init__(
        self,
        shape: LevelShape,
        *,
        alpha: Weight,
        beta: Weight,
        regions: Regions,
        constraint: Constraint,
        width: Width,
    ) -> None:
        super().__init__()
        self.alpha = alpha if regions != "low" else 0.0
        self.beta = beta if regions != "high" else 0.0
        self.transform_high = constraint in ("mixed", "transformed")
        self.transform_low = constraint in ("swapped", "transformed")
        self.adapt = Adapter(shape)
        self.after_adapter = width == "teacher"
        channels = shape.teacher_channels if self.after_adapter else shape.student_channels
        self.transform = generator(channels) if self.transform_high or self.transform_low else None

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        high = high_disparity(level.teacher, adapted(self.adapt, level))
        loss = level.teacher.new_zeros((), dtype=torch.float32)
        parts = ((self.alpha, high, self.transform_high), (self.beta, ~high, self.transform_low))
        for weight, region, through in parts:
            if weight:
                error = self._transformed_error(level) if through else adapted_error(self.adapt, level)
                loss = loss + weight * error.where(region, 0).mean()
        return loss

    def _transformed_error(self, level: Level) -> Tensor:
        """Mean over channels of (F_T − f_trans(F_S))²: (B, H, W)."""
        return level.once((self, "transformed"), lambda: squared_error(self._transformed(level), level.teacher))

    def _transformed(self, level: Level) -> Tensor:
        assert self.transform is not None
        through: Tensor
        if self.after_adapter:
            through = self.transform(adapted(self.adapt, level))
        else:
            through = self.adapt(self.transform(level.student))
        return through


def high_disparity(teacher: Tensor, student: Tensor) -> Tensor:
    """(B, H, W) boolean: where the disparity of spatial attention is at least its mean over the map; no gradient."""
    disparity = (spatial_attention(teacher) - spatial_attention(student.detach())).abs()
    return disparity >= disparity.mean((1, 2), keepdim=True)
