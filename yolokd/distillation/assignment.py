"""The positions that the YOLO loss assigns to labelled objects, noted as Ultralytics' assigner chooses them."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class AssignedPositions:
    """Notes which positions Ultralytics' TaskAlignedAssigner assigned to objects in the present step."""

    def __init__(self) -> None:
        self._assigned: Tensor | None = None

    def watch(self, criterion: Any) -> None:
        """Note what the assigner of Ultralytics' criterion chooses; in an end-to-end one, the one-to-many loss's."""
        assigner = getattr(getattr(criterion, "one2many", criterion), "assigner", None)
        if isinstance(assigner, nn.Module):
            assigner.register_forward_hook(self._note)

    def _note(self, _assigner: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        self._assigned = output[3]

    def take(self, images: int) -> Tensor:
        """Return the step's assigned positions, (images, anchors) bool, and forget them.

        Nothing is assigned in images that the YOLO loss did not see: those beyond its first ones.
        """
        assigned, self._assigned = self._assigned, None
        assert assigned is not None
        return F.pad(assigned, (0, 0, 0, images - len(assigned)))
