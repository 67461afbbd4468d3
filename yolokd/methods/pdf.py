"""PDF-Distil, prediction-disagreement-weighted feature distillation (Zhang et al., BMVC 2021)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, adapted_error
from yolokd.pyramid.boxes import iou

Distance = Literal["l2", "euclidean", "l1", "kl"]
Weighting = Literal["soft", "uniform", "most25", "most50", "least25", "least50"]


@register("pdf")
class PDF(Method):
    """Weights the feature error at each position with how much the two models' class predictions disagree there.

    D_hw = Σ_classes F(P_T, P_S) on class probabilities, W_hw = H·W·D_hw / Σ D,
    L = Σ_hw W_hw Σ_c (F_T − F_S)² / (H·W·C), meaned over the batch. F_S is the adapted student map; W carries no
    gradient.

    distance: F, squared difference (the paper's best is L2), absolute difference, or KL divergence (of Bernoulli
    distributions, teacher first, since YOLO's classes are independent sigmoids); `euclidean` is the root of the sum of
    squared differences, as the authors' released code has it, which leaves agreeing positions more weight.
    weighting: `soft` is the method; the others are its Table 1 ablation: `uniform`, or D = 1 at the 25 % / 50 % of
    positions that disagree most (least) and 0 elsewhere; the mean of W is 1 in each.
    box: the paper's §5 names the disagreement of boxes as future work. Ours: D gains box · max_c P_T · (1 − IoU) of the
    boxes that both models predict at the position; where the teacher sees nothing, neither box means anything.
    Where both models agree exactly everywhere, `soft` is uniform: the limit of equal disagreement.
    """

    paper = "PDF-Distil: prediction disagreements, Zhang et al., BMVC 2021"
    wants_logits = True

    def __init__(self, shape: LevelShape, *, distance: Distance, weighting: Weighting, box: Weight) -> None:
        super().__init__()
        self.box = box
        self.wants_boxes = box > 0
        self.distance: Distance = distance
        self.weighting: Weighting = weighting
        self.adapt = Adapter(shape)

    def forward(self, level: Level) -> Tensor:
        """Scalar float32 loss of one level."""
        assert level.teacher_logits is not None
        assert level.student_logits is not None
        disagreement = disagree(level.teacher_logits, level.student_logits.detach(), self.distance)
        if self.wants_boxes:
            disagreement = disagreement + self.box * disagree_on_boxes(level)
        return (position_weights(disagreement, self.weighting) * adapted_error(self.adapt, level)).mean()


def disagree(teacher: Tensor, student: Tensor, distance: Distance) -> Tensor:
    """D: two (B, K, H, W) logits -> (B, H, W) float32, summed over classes."""
    t, s = teacher.float(), student.float()
    if distance == "kl":
        # Each Bernoulli's KL from logits: log-probabilities by log-sigmoid stay finite where probabilities underflow.
        p = t.sigmoid()
        kl = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        return kl.sum(1).clamp(min=0)  # near agreement float32 cancels to less
    difference = t.sigmoid() - s.sigmoid()
    if distance == "l1":
        return difference.abs().sum(1)
    squared = difference.square().sum(1)
    return squared.sqrt() if distance == "euclidean" else squared


def disagree_on_boxes(level: Level) -> Tensor:
    """max_c P_T · (1 − IoU) of the predicted boxes: (B, H, W) float32, no gradient."""
    assert level.teacher_logits is not None
    assert level.teacher_boxes is not None
    assert level.student_boxes is not None
    overlap = iou(level.teacher_boxes.float(), level.student_boxes.detach().float())
    return level.teacher_logits.float().amax(1).sigmoid() * (1 - overlap)


def position_weights(disagreement: Tensor, weighting: Weighting) -> Tensor:
    """W: (B, H, W) disagreement >= 0 -> (B, H, W) weights."""
    b, h, w = disagreement.shape
    d = disagreement.flatten(1)
    if weighting == "uniform":
        return d.new_ones(b, h, w)
    if weighting == "soft":
        total = d.sum(1, keepdim=True)
        return ((d * (h * w) / total.where(total > 0, 1)).where(total > 0, 1)).view(b, h, w)
    share = 0.25 if weighting.endswith("25") else 0.5
    kept = max(round(share * h * w), 1)
    index = d.topk(kept, dim=1, largest=weighting.startswith("most")).indices
    return d.new_zeros(d.shape).scatter(1, index, h * w / kept).view(b, h, w)
