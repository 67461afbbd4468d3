"""FGD, focal and global distillation (Yang et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, adapted, channel_attention, spatial_attention


@register("fgd")
class FGD(Method):
    """Separates labelled boxes from background, weights positions and channels by the teacher's attention.

    With A^S = H·W·softmax(mean_c |F| / T), A^C = C·softmax(mean_hw |F| / T), M = 1 inside labelled boxes, and scale
    S = 1 over the area of the smallest box over a position, 1 / N_bg outside:
    focal      L_f = Σ_hw (α M + β (1 − M)) S A^S_T · Σ_c A^C_T (F_T − F_S)² / C
    attention  L_a = γ (mean_hw |A^S_T − A^S_S| + mean_c |A^C_T − A^C_S|)
    global     L_g = λ · Σ (R(F_T) − R(F_S))² / (C·H·W), R a global-context block
    and L = L_f + L_a + L_g, meaned over the batch. Positions in L_f are summed: S makes each box, and the background,
    count once. F_S is the adapted student map; nothing of the teacher's side carries gradient, but for R.
    """

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
        """Scalar float32 loss of one level."""
        student, teacher = adapted(self.adapt, level), level.teacher
        positions = spatial_attention(teacher, self.temperature)
        channels = channel_attention(teacher, self.temperature)
        errors = F.mse_loss(student.float(), teacher.float(), reduction="none")
        error = (channels[:, :, None, None] * errors).mean(1)
        focal = (self.position_weights(level) * positions * error).sum((1, 2)).mean()
        attention = (positions - spatial_attention(student, self.temperature)).abs().mean()
        attention = attention + (channels - channel_attention(student, self.temperature)).abs().mean()
        context = F.mse_loss(self.context(student).float(), self.context(teacher).float())
        return focal + self.gamma * attention + self.lambda_ * context

    def position_weights(self, level: Level) -> Tensor:
        """(α M + β (1 − M)) S: (B, H, W) float32."""
        inverse = level.inverse_areas()
        background = (inverse == 0).float()
        share = background / background.sum((1, 2), keepdim=True).clamp(min=1)
        return self.alpha * inverse + self.beta * share


class GlobalContext(nn.Module):
    """R(F) = F + f(Σ_hw softmax(k(F)) F), k a 1x1 convolution to one channel, f 1x1-LayerNorm-ReLU-1x1, at first 0.

    One R for both models, as in the equation; the released code trains one for each.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = max(channels // 2, 1)  # FGD's; GCNet itself takes a quarter or a sixteenth
        self.key = nn.Conv2d(channels, 1, kernel_size=1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, narrow, kernel_size=1),
            nn.LayerNorm([narrow, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, channels, kernel_size=1),
        )
        for parameter in self.transform[-1].parameters():  # as in the released code: R begins as the identity
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        attention = self.key(maps).float().flatten(2).softmax(2)
        context = (maps.float().flatten(2) * attention).sum(2)[:, :, None, None]
        added: Tensor = maps + self.transform(context.to(maps.dtype))
        return added
