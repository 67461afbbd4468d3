"""What is noted of a step while Ultralytics runs it: assigned positions, and maps within the student's head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from yolokd.pyramid.head import Head


@dataclass(frozen=True)
class Observed:
    """Holds what was noted of one step.

    assigned: (B, anchors) bool, the positions that the YOLO loss assigned to objects; None if no method wants them.
    box_maps, class_maps: {(stride, depth): the (B, C, H, W) map that entered the layer of that number in the branch of
    the student's head}. neck_maps: those that entered a head that does not predict at every position.
    """

    assigned: Tensor | None = None
    box_maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    class_maps: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    neck_maps: list[Tensor] = field(default_factory=list)


class StepObserver:
    """Notes what methods want of each of the student's steps.

    wants_assigned: whether to note assigned positions. depths: the layers of the head whose maps to note.
    """

    def __init__(self, wants_assigned: bool, depths: Collection[int]) -> None:
        self._wants_assigned, self._depths = wants_assigned, depths
        self._observed = Observed()
        self._assigned: Tensor | None = None
        self._hooks: list[RemovableHandle] = []

    def watch_assigner(self, criterion: Any) -> None:
        """Note from now on what the TaskAlignedAssigner of Ultralytics' criterion chooses.

        An end-to-end criterion has two; the one of the one-to-many loss counts.
        """
        assigner = getattr(getattr(criterion, "one2many", criterion), "assigner", None)
        if self._wants_assigned and isinstance(assigner, nn.Module):
            assigner.register_forward_hook(self._note_assigned)

    def _note_assigned(self, _assigner: nn.Module, _inputs: Any, output: tuple[Tensor, ...]) -> None:
        self._assigned = output[3]

    def watch_head(self, head: nn.Module | None, parts: Mapping[int, Head]) -> None:
        """Note the wanted maps of the next forward pass of the student's head.

        parts: of the head by stride; without any, the maps that enter it are noted: it does not return them.
        The hooks stay until `take`: a checkpoint or a copy of the student must hold none.
        """
        self.discard()
        if head is not None and not parts:
            entering = self._observed.neck_maps
            self._hooks.append(head.register_forward_pre_hook(lambda _head, inputs: entering.extend(inputs[0])))
        for stride, part in parts.items():
            for depth in self._depths:
                for layers, maps in (
                    (part.box_layers, self._observed.box_maps),
                    (part.class_layers, self._observed.class_maps),
                ):
                    note = partial(_note_map, maps, (stride, depth))
                    self._hooks.append(layers[depth - 1].register_forward_hook(note))

    def take(self, images: int) -> Observed:
        """Return what was noted of a step with so many images, and forget it.

        Nothing is assigned in images that the YOLO loss did not see: those beyond its first ones.
        """
        assigned, observed = self._assigned, self._observed
        self.discard()
        if not self._wants_assigned:
            return observed
        assert assigned is not None
        padded = F.pad(assigned, (0, 0, 0, images - len(assigned)))
        return replace(observed, assigned=padded)

    def discard(self) -> None:
        """Forget what was noted, and remove the hooks from the student's head."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._assigned, self._observed = [], None, Observed()


def _note_map(
    maps: dict[tuple[int, int], Tensor], key: tuple[int, int], _layer: nn.Module, _inputs: Any, output: Tensor
) -> None:
    maps[key] = output
