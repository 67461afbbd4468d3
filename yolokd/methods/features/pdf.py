"""PDF-Distil, prediction-disagreement-weighted feature distillation (Zhang et al., BMVC 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, adapted_error
from yolokd.pyramid.boxes import iou

Distance = Literal["l2", "euclidean", "l1", "kl"]
Scope = Literal["level", "batch"]
Weighting = Literal["soft", "uniform", "most25", "most50", "least25", "least50"]


@register("pdf")
class PDF(Method):
    """Weight the feature error at each position by how much the two models' class predictions disagree there.

    Paper: Zhang et al., BMVC 2021, https://papertalk.org/papertalks/34609

        L = Σ_hw W_hw Σ_c (F_T − F_S)² / (C·H·W), averaged over the batch
        W_hw = H·W·D_hw / Σ_hw D_hw
        D_hw = Σ_classes F(P_T, P_S), the disagreement

    F_T: the teacher's map. F_S: the adapted student map. P_T, P_S: class probabilities of teacher and student. F: the
    distance. C, H, W: channels, height and width of F_T. W_hw carries no gradient.

    distance: F. `l2`: the squared difference, as in the authors' code since July 2022. `euclidean`: the root of the sum
    of squared differences, as in their release 1.1 (October 2021) and until then; positions that agree get more weight
    with it. The paper's best is "L2", which can mean either. `l1`: the absolute difference. `kl`: the KL divergence of
    Bernoulli distributions, teacher first, since YOLO's classes are independent sigmoids.
    weighting: `soft` is the method. The others are the ablation of the paper's Table 1: `uniform`, or D = 1 at the 25 %
    or 50 % of positions that disagree most (`most25`, `most50`) or least (`least25`, `least50`), and 0 elsewhere; the
    authors' code ranks by `l1` there. The mean of W is 1 in each. To reproduce the table, give balance=off and
    pdf.schedule=constant, as in the paper: balanced gains give every variant the same gradient.
    scope: over what W has the mean 1. `level`: each image at each level, as in the equation. So an image on which the
    models agree weighs as much as one on which they disagree. `batch`: all positions of the batch at all levels
    together, as in the authors' code. An image or level then counts more, the more the models disagree there, and a
    level also by its number of positions. With balanced gains, each level's gradient is brought to its target all the
    same. The two scopes then differ only in how much one image of a batch weighs beside another, and one batch beside
    the next. Each process takes its own images.
    box: the weight of the disagreement of boxes (ours; the paper's §5 names it as future work). It adds
    box · max_c P_T · (1 − IoU) to D, with the IoU of the boxes that both models predict at the position. max_c P_T is
    there because neither box means anything where the teacher sees nothing.

    Ours: The authors' D is a mean over the anchors of a position; YOLO has one. Their adapter is a 3x3 convolution
    block and a 1x1 convolution, ours the latter alone. From December 2021 to June 2022 their code also had losses of
    class scores and boxes. If both models agree exactly at all positions, `soft` is uniform, the limit of equal
    disagreement.
    """

    paper = "PDF-Distil: prediction disagreements, Zhang et al., BMVC 2021"
    wants_logits = True
    box_weight = "box"

    def __init__(
        self, shape: LevelShape, *, distance: Distance, weighting: Weighting, scope: Scope, box: Weight
    ) -> None:
        super().__init__()
        self.scope: Scope = scope
        self.box = box
        self.wants_boxes = box > 0
        self.distance: Distance = distance
        self.weighting: Weighting = weighting
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar, as if the batch had no other level."""
        return self.losses([self], [level])[0]

    @classmethod
    def losses(cls, methods: Sequence[Any], levels: Sequence[Level]) -> list[Tensor]:
        """Return the loss of each level, float32 scalars; with scope=batch they depend on each other."""
        disagreements = [method.disagreement(level) for method, level in zip(methods, levels, strict=True)]
        weighting, scope = methods[0].weighting, methods[0].scope
        if scope == "batch":
            weights = weights_over_levels(disagreements, weighting)
        else:
            weights = [position_weights(disagreement, weighting) for disagreement in disagreements]
        return [
            (w * adapted_error(method.adapt, level)).mean()
            for w, method, level in zip(weights, methods, levels, strict=True)
        ]

    def disagreement(self, level: Level) -> Tensor:
        """Return D, (B, H, W) float32, of classes and, if they count, of boxes; no gradient."""
        assert level.teacher_logits is not None
        assert level.student_logits is not None
        disagreement = class_disagreement(level.teacher_logits, level.student_logits.detach(), self.distance)
        return disagreement + self.box * box_disagreement(level) if self.wants_boxes else disagreement


def class_disagreement(teacher: Tensor, student: Tensor, distance: Distance) -> Tensor:
    """Return D of two (B, K, H, W) logits, summed over classes: (B, H, W) float32, at least 0."""
    t, s = teacher.float(), student.float()
    if distance == "kl":
        # From logits by log-sigmoid: log-probabilities stay finite even if probabilities underflow.
        p = t.sigmoid()
        kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        return kl.sum(1).clamp(min=0)  # close to agreement, rounding in float32 can give less than 0
    difference = t.sigmoid() - s.sigmoid()
    if distance == "l1":
        return difference.abs().sum(1)
    squared = difference.square().sum(1)
    return squared.sqrt() if distance == "euclidean" else squared


def box_disagreement(level: Level) -> Tensor:
    """Return max_c P_T · (1 − IoU) of the predicted boxes, (B, H, W) float32; no gradient."""
    assert level.teacher_logits is not None
    assert level.teacher_boxes is not None
    assert level.student_boxes is not None
    overlap = iou(level.teacher_boxes.float(), level.student_boxes.detach().float())
    return level.teacher_logits.float().amax(1).sigmoid() * (1 - overlap)


def position_weights(disagreement: Tensor, weighting: Weighting) -> Tensor:
    """Return W, (B, H, W), of a disagreement D, (B, H, W), that is nowhere negative."""
    b, h, w = disagreement.shape
    d = disagreement.flatten(1)
    if weighting == "uniform":
        return d.new_ones(b, h, w)
    if weighting == "soft":
        total = d.sum(1, keepdim=True)
        return ((d * (h * w) / total.where(total != 0, 1)).where(total != 0, 1)).view(b, h, w)  # NaN stays NaN
    fraction = 0.25 if weighting.endswith("25") else 0.5
    count = max(round(fraction * h * w), 1)
    index = d.topk(count, dim=1, largest=weighting.startswith("most")).indices
    return d.new_zeros(d.shape).scatter(1, index, h * w / count).view(b, h, w)


def weights_over_levels(disagreements: Sequence[Tensor], weighting: Weighting) -> list[Tensor]:
    """Return W of L disagreements, (B, H, W) each of its own size, normalized over all of their positions together.

    The mean over the levels of the mean of W·e is then the mean of W·e over all positions, where W has the mean 1: a
    level's W is scaled by its number of positions, as a multiple of the levels' mean.
    """
    everywhere = torch.cat([d.flatten() for d in disagreements])
    weights = position_weights(everywhere[None, None], weighting).flatten()
    parts = torch.split(weights, [d.numel() for d in disagreements])
    mean_count = len(everywhere) / len(disagreements)
    return [part.view_as(d) * (d.numel() / mean_count) for part, d in zip(parts, disagreements, strict=True)]
