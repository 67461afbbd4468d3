"""LD, localization distillation (Zheng et al., CVPR 2022)."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from yolokd.errors import UserError
from yolokd.methods.base import Level, LevelShape, Method, Weight, register
from yolokd.pyramid.boxes import box_divergence
from yolokd.pyramid.regions import valuable_region


@register("ld")
class LD(Method):
    """Pull the student's distributions of box distances to the teacher's, at and around labelled objects.

    Paper: Zheng et al., CVPR 2022, https://arxiv.org/abs/2102.12252

        L = main · I_main · L_LD + valuable · I_VLR · L_LD, averaged over positions and batch
        L_LD = τ² · KL(softmax(z_T / τ) ‖ softmax(z_S / τ)), averaged over the four sides of the box

    z_T, z_S: the logits of both heads over the bins of a side's distance. I_main: 1 at the positions that the YOLO loss
    of the step assigned to objects, 0 elsewhere. I_VLR: 1 in the valuable localization region, 0 elsewhere: where the
    DIoU of a position's anchor with a labelled box is between γ·α_pos and α_pos; see `pyramid.regions`. A position in
    both regions gets both weights; images without labels have neither region. There is no adapter: the method trains
    the student's head and all below it. Both heads must predict distributions, over the same number of bins: heads with
    reg_max=1, such as YOLO26's, are refused.

    tau: the paper's τ. gamma: the paper's γ. main, valuable: the weights of the two regions.

    Ours: a mean over all positions, where the released code sums over those of a region. That code also weights the
    main region by the student's top class score and the valuable one by the anchor's IoU, divides the latter's loss by
    another 4, takes the mean of the KL divergence's terms over bins instead of their sum, and divides by the anchor's
    area in the DIoU. YOLO has no anchors; ours are those of that code, around each position. The paper's distillation
    of class scores is left out. Of an end-to-end student, the one-to-many head is taught, and that of an end-to-end
    teacher teaches: see FRS.
    """

    paper = "LD: localization distillation, Zheng et al., CVPR 2022"
    wants_box_logits = True
    wants_assigned = True
    needs_labels = True  # both regions lie at labelled objects

    def __init__(
        self,
        shape: LevelShape,
        *,
        tau: Annotated[float, Field(gt=0, allow_inf_nan=False)],
        gamma: Annotated[float, Field(ge=0, le=1)],
        main: Weight,
        valuable: Weight,
    ) -> None:
        super().__init__()
        _check_bins(shape)
        self.strides = shape.strides or (shape.stride,)
        self.tau, self.gamma, self.main, self.valuable = tau, gamma, main, valuable

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a float32 scalar."""
        assert level.student_box_logits is not None
        assert level.teacher_box_logits is not None
        assert level.assigned is not None
        divergence = box_divergence(level.student_box_logits, level.teacher_box_logits, self.tau)
        weights = self.main * level.assigned.float() + self.valuable * self.region(level).float()
        return (weights * divergence).mean()

    def region(self, level: Level) -> Tensor:
        """Return I_VLR, (B, H, W) bool."""
        assert level.labels is not None
        b, _, h, w = level.student.shape
        size = h * level.stride, w * level.stride
        return valuable_region(
            level.labels, b, size, self.strides, level.stride, self.gamma, device=level.student.device
        )


def _check_bins(shape: LevelShape) -> None:
    if shape.student_head is None or shape.teacher_head is None:
        return
    bins = {"student": shape.student_head.bins, "teacher": shape.teacher_head.bins}
    cure = "use bckd, which compares the boxes themselves"
    for model, count in bins.items():
        if count == 1:
            problem = f"compares distributions of box distances, and the {model}'s head predicts single distances"
            raise UserError("method=ld", f"{problem} (reg_max=1)", cure)
    if bins["student"] != bins["teacher"]:
        problem = f"compares distributions of box distances: over {bins['teacher']} bins in the teacher's head"
        raise UserError("method=ld", f"{problem}, over {bins['student']} in the student's", cure)
