"""BCKD, binary-classification and IoU-based distillation of predictions (Yang et al., ICCV 2023)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.pyramid.boxes import iou


@register("bckd")
class BCKD(Method):
    """Pull the student's class scores and boxes to the teacher's, most where their class scores differ.

    Paper: Yang et al., ICCV 2023, https://arxiv.org/abs/2308.14286

        L = α_1 · L_cls + α_2 · L_loc, averaged over positions and batch
        L_cls = Σ_k w_k · BCE(z_S, p_T)
        L_loc = max_k w_k · (1 − IoU(b_S, b_T))
        w_k = |p_T − p_S| of class k

    p_T, p_S: class probabilities, each class by itself. z_S: the student's class logits. b_T, b_S: the boxes that both
    models predict at the position. BCE: binary cross-entropy. Σ and max run over the shared classes, so the box of an
    object that is of no shared class counts little. w carries no gradient. There is no adapter: the method trains the
    student's head and all below it.

    alpha_1, alpha_2: the paper's α_1 and α_2, the weights of class scores and boxes.

    Ours: a mean over positions, where the released code divides by the number of positions assigned to objects. That
    code lets gradient flow through w of L_cls, and has the GIoU in the place of the IoU. Of an end-to-end student,
    the one-to-many head is taught, and that of an end-to-end teacher teaches: see FRS.
    """

    paper = "BCKD: binary classification and IoU, Yang et al., ICCV 2023"
    wants_logits = True
    wants_boxes = True  # by default
    box_weight = "alpha_2"

    def __init__(self, shape: LevelShape, *, alpha_1: Weight, alpha_2: Weight) -> None:
        super().__init__()
        self.alpha_1, self.alpha_2 = alpha_1, alpha_2
        self.wants_boxes = alpha_2 > 0

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        assert level.teacher_logits is not None
        assert level.student_logits is not None
        logits, target = level.student_logits.float(), level.teacher_logits.float().sigmoid()
        weights = (target - logits.detach().sigmoid()).abs()
        scores = (weights * F.binary_cross_entropy_with_logits(logits, target, reduction="none")).sum(1)
        if not self.wants_boxes:
            return (self.alpha_1 * scores).mean()
        assert level.teacher_boxes is not None
        assert level.student_boxes is not None
        boxes = weights.amax(1) * (1 - iou(level.student_boxes.float(), level.teacher_boxes.float()))
        return (self.alpha_1 * scores + self.alpha_2 * boxes).mean()
