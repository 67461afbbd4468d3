"""What a teacher returns for a batch, and what a step asks of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TeacherOutput:
    """The teacher's output for a batch, each a dictionary by stride; empty if it was not requested or has no branch.

    maps: (B, C, H, W) neck maps, in the teacher's dtype. logits: (B, nc, H, W) class scores before the sigmoid.
    mean_logits: the mean of the logits of an end-to-end teacher's two branches; the logits for other teachers.
    boxes: (B, 4, H, W) distances left, top, right, bottom from the cell's center, in cells.
    box_logits: (B, 4·bins, H, W) raw box outputs, from which these distances are decoded.
    """

    maps: dict[int, Tensor]
    logits: dict[int, Tensor]
    mean_logits: dict[int, Tensor]
    boxes: dict[int, Tensor]
    box_logits: dict[int, Tensor]


@dataclass(frozen=True)
class RequestedOutputs:
    """The predictions that a step needs beside the neck maps; other branches of the head do not run."""

    logits: bool = False
    mean_logits: bool = False
    boxes: bool = False
    box_logits: bool = False


MAPS_ONLY = RequestedOutputs()
