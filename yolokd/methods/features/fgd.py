"""FGD, focal and global distillation (Yang et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, adapted, channel_attention, recomputed, spatial_attention
from yolokd.pyramid.squared_error import mean_squared_error, squared_error


@register("fgd")
class FGD(Method):
    """Compare labelled boxes and background apart, and weight positions and channels by the teacher's attention.

    Paper: Yang et al., CVPR 2022, https://arxiv.org/abs/2111.11837

        L = L_focal + L_attention + L_global, averaged over the batch
        L_focal = Σ_hw (α M + β (1 − M)) S A^S_T · Σ_c A^C_T (F_T − F_S)² / C
        L_attention = γ (mean_hw |A^S_T − A^S_S| + mean_c |A^C_T − A^C_S|)
        L_global = λ · Σ (R(F_T) − R(F_S))² / (C·H·W)
        A^S = H·W·softmax over positions of mean_c |F| / T, the spatial attention
        A^C = C·softmax over channels of mean_hw |F| / T, the channel attention

    F_T: the teacher's map. F_S: the adapted student map. M: 1 inside labelled boxes, else 0. S: the scale, one over the
    area of the smallest box that covers a position; one over the number of background positions outside. R: a
    GlobalContext block. C, H, W: channels, height and width of F_T. L_focal sums over positions: by S each box counts
    once, less what smaller boxes cover of it, and so does the background. On the teacher's side only R is trained.

    alpha, beta: the paper's α and β, the weights of boxes and background. gamma: γ, the weight of the attention loss.
    lambda_: λ, the weight of the global loss. temperature: T, of both attentions.

    Ours: means over channels, and for γ and λ over positions, where the released code has sums. Its attention loss thus
    weights the positions' part H·W/C times as much, beside the channels' part, as ours does. The adapter is also there
    where both models have the same channels; the released code then has none.

    Of a batch with unlabelled images it sees the labelled ones alone.

    A box covers the cells that it touches, as in the paper's equation, so that S over a box that no smaller one
    overlaps sums to 1. In the released code a box covers one column more at the right and one row more below.
    They count in its area even beyond the border, so that S over such a box sums to less than 1.
    """

    needs_labels = True  # else all of an unlabelled image would count as background
    paper = "FGD: focal and global distillation, Yang et al., CVPR 2022"

    def __init__(
        self,
        shape: LevelShape,
        *,
        alpha: Weight,
        beta: Weight,
        gamma: Weight,
        lambda_: Weight,
        temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)],
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma, self.lambda_, self.temperature = alpha, beta, gamma, lambda_, temperature
        self.adapt = Adapter(shape)
        self.context = GlobalContext(shape.teacher_channels)

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        student, teacher = adapted(self.adapt, level), level.teacher
        positions = spatial_attention(teacher, self.temperature)
        channels = channel_attention(teacher, self.temperature)
        error = squared_error(student, teacher, channels)
        focal = (self.position_weights(level) * positions * error).sum((1, 2)).mean()
        attention = (positions - spatial_attention(student, self.temperature)).abs().mean()
        attention = attention + (channels - channel_attention(student, self.temperature)).abs().mean()
        context = mean_squared_error(self.context(student), self.context(teacher))
        return focal + self.gamma * attention + self.lambda_ * context

    def position_weights(self, level: Level) -> Tensor:
        """Return (α M + β (1 − M)) S, (B, H, W) float32."""
        box_scale = level.inverse_areas()
        background = (box_scale == 0).float()
        background_scale = background / background.sum((1, 2), keepdim=True).clamp(min=1)
        return self.alpha * box_scale + self.beta * background_scale


class GlobalContext(nn.Module):
    """Add to each position a summary of the whole map: R(F) = F + f(Σ_hw softmax over positions(k(F)) · F).

    k: a 1x1 convolution to one channel. f: 1x1-LayerNorm-ReLU-1x1, 0 at first. There is one R for both models, as in
    the paper's equation; the released code trains one for each.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(channels // 2, 1)  # FGD's choice; GCNet itself takes a quarter or a sixteenth
        self.key = nn.Conv2d(channels, 1, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, narrow, kernel_size=1),
            nn.LayerNorm([narrow, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, channels, kernel_size=1),
        )
        for parameter in self.transform[-1].parameters():  # as in the released code: R starts as the identity
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        """Return R(F) of F: (B, C, H, W) -> (B, C, H, W)."""
        if not torch.is_autocast_enabled(maps.device.type):
            maps = maps.to(self.key.weight.dtype)  # a teacher in half precision beside a student in float32
        attention = self.key(maps).float().flatten(2).softmax(2)
        context = recomputed(lambda m, a: (m.float().flatten(2) * a).sum(2), maps, attention)[:, :, None, None]
        output: Tensor = maps + self.transform(context.to(maps.dtype))
        return output
