"""CrossKD, cross-head distillation (Wang et al., CVPR 2024)."""

from __future__ import annotations

from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from yolokd.errors import UserError
from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.methods.blocks import Adapter, ChannelAdapter, adapted
from yolokd.pyramid.boxes import box_divergence, decode_distances, giou

BoxLoss = Literal["giou", "kl"]
Region = Literal["assigned", "confident"]


@register("crosskd")
class CrossKD(Method):
    """Send the student's map through the teacher's frozen head, and compare its predictions there with the teacher's.

    Paper: Wang et al., CVPR 2024, https://arxiv.org/abs/2306.11369

        L = α · Σ_k QFL(z_C, p_T) + β · S · D(b_C, b_T), averaged over positions and batch
        QFL(z_C, p_T) = |p_T − p_C|^γ · BCE(z_C, p_T)
        D = 1 − GIoU, or the KL divergence of the box distributions, as in LD with τ = 1

    z_C, p_C, b_C: class logits, class probabilities and boxes that the teacher's head predicts from the student's
    adapted map. p_T, b_T: the teacher's own predictions. Σ runs over the shared classes. S: the region where boxes are
    compared. The gradient flows through the teacher's head, which itself never changes, to the adapter and to the
    layers of the student that computed the map. The other layers of its head are trained by labels alone.

    alpha, beta: α and β, the weights of class scores and boxes. gamma: γ, QFL's exponent. depth: how many layers of the
    student's head come before the adapter; the teacher's head goes on from there. 0: the student's neck map enters the
    teacher's head. 1 or 2: the map behind so many of the head's three layers, for boxes and for classes each.
    box: D, `giou` or `kl`; the latter needs a teacher with box distributions. region: S. `assigned` is 1 at the
    positions that the YOLO loss of the step assigned to objects, 0 elsewhere, our reading of the paper's foreground;
    `confident` (ours) is max_k p_T, which needs no labels.

    Ours: a mean over all positions, also for boxes. The adapter is a 1x1 convolution, also between equal channels. The
    paper's code was not read, because its licence forbids its use. Of an end-to-end teacher, the one-to-many head
    teaches. Of an end-to-end student, the neck is taught, which both of its heads share, and with a depth above 0 the
    one-to-many head; `assigned` are the positions of its one-to-many loss.
    """

    paper = "CrossKD: cross-head distillation, Wang et al., CVPR 2024"
    wants_logits = wants_teacher_head = True
    wants_boxes = wants_assigned = True  # by default
    box_weight = "beta"

    def __init__(
        self,
        shape: LevelShape,
        *,
        alpha: Weight,
        beta: Weight,
        gamma: Annotated[float, Field(ge=1, allow_inf_nan=False)],
        depth: Annotated[int, Field(ge=0, le=2)],
        box: BoxLoss,
        region: Region,
    ) -> None:
        super().__init__()
        if box == "kl" and shape.teacher_head is not None and shape.teacher_head.bins == 1:
            problem = "compares distributions of box distances, and the teacher's head predicts single distances"
            raise UserError("crosskd.box=kl", f"{problem} (reg_max=1)", "use crosskd.box=giou")
        self.head_depth = depth
        self.alpha, self.beta, self.gamma = alpha, beta, gamma
        self.box: BoxLoss = box
        self.region: Region = region
        self.wants_boxes, self.wants_box_logits = beta > 0 and box == "giou", beta > 0 and box == "kl"
        self.wants_assigned = beta > 0 and region == "assigned"
        self.needs_labels = alpha == 0 and region == "assigned"
        if not depth:
            self.adapt = Adapter(shape)
            return
        student, teacher = shape.student_head, shape.teacher_head
        assert student is not None
        assert teacher is not None
        # Not of the class Adapter, which methods share: these read maps of the head.
        if beta:
            self.adapt_boxes = ChannelAdapter(student.box_channels[depth], teacher.box_channels[depth])
        self.adapt_classes = ChannelAdapter(student.class_channels[depth], teacher.class_channels[depth])

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        assert level.teacher_head is not None
        box_maps, class_maps = self.adapted_maps(level)
        scores = self.class_loss(level.teacher_head.class_logits(class_maps, self.head_depth), level)
        if box_maps is None:
            return (self.alpha * scores).mean()
        boxes = self.box_loss(level.teacher_head.box_logits(box_maps, self.head_depth), level)
        return (self.alpha * scores + self.beta * boxes).mean()

    def adapted_maps(self, level: Level) -> tuple[Tensor | None, Tensor]:
        """Return the adapted maps that enter the teacher's branches of boxes, if these count, and of classes."""
        if not self.head_depth:
            maps = adapted(self.adapt, level)
            return maps if self.beta else None, maps
        box_maps, class_maps = level.head_maps[self.head_depth]
        return self.adapt_boxes(box_maps) if self.beta else None, self.adapt_classes(class_maps)

    def class_loss(self, logits: Tensor, level: Level) -> Tensor:
        """Return Σ_k QFL(z_C, p_T), (B, H, W). logits: z_C, (B, K, H, W)."""
        assert level.teacher_logits is not None
        logits, target = logits.float(), level.teacher_logits.float().sigmoid()
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return ((target - logits.sigmoid()).abs() ** self.gamma * entropy).sum(1)

    def box_loss(self, raw: Tensor, level: Level) -> Tensor:
        """Return S · D(b_C, b_T), (B, H, W). raw: the box output from the student's map, (B, 4, bins, H, W)."""
        if self.box == "kl":
            assert level.teacher_box_logits is not None
            distance = box_divergence(raw, level.teacher_box_logits, tau=1.0)
        else:
            assert level.teacher_boxes is not None
            boxes = decode_distances(raw.flatten(1, 2), bins=raw.shape[2])
            distance = 1 - giou(boxes, level.teacher_boxes.float())
        return self.box_weights(level) * distance

    def box_weights(self, level: Level) -> Tensor:
        """Return S, (B, H, W) float32."""
        if self.region == "assigned":
            assert level.assigned is not None
            return level.assigned.float()
        assert level.teacher_logits is not None
        return level.teacher_logits.float().amax(1).sigmoid()
