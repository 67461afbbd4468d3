"""The head of a YOLO at one level: a branch of layers for boxes, and one for classes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolokd.pyramid.boxes import split_bins


@dataclass(frozen=True)
class HeadShape:
    """The shape of a head at one level.

    bins: per side of a box; with 1, the head predicts the distance itself instead of a distribution. box_channels,
    class_channels: of the map that enters each layer of the branch, so that the first is the neck map's. rotated:
    whether its boxes are, by angles that it predicts beside their sides.
    """

    bins: int
    box_channels: tuple[int, ...]
    class_channels: tuple[int, ...]
    rotated: bool = False


@dataclass(frozen=True, eq=False)
class Head:
    """A head at one level, as two functions of a map; both are differentiable.

    box_layers, class_layers: the layers of both branches; the last layer of each predicts. bins: per side of a box.
    select: returns the logits of the shared classes, (B, K, H, W), from those of all, (B, nc, H, W); None: all.
    rotated: as in HeadShape.

    Both run in the precision of the layers' weights, whatever that of the map: autocast would round predictions that
    nearly agree, and with them the gradient of their difference (in bfloat16 by half, on random detectors).
    They begin at the layer number `depth`, counted from 0: with depth 0 the map is a neck map.
    """

    box_layers: nn.Sequential
    class_layers: nn.Sequential
    bins: int
    select: Callable[[Tensor], Tensor] | None = None
    rotated: bool = False

    def box_logits(self, maps: Tensor, depth: int = 0) -> Tensor:
        """Return the raw box output, (B, 4, bins, H, W), of the (B, C, H, W) map that enters a layer."""
        return split_bins(_run(self.box_layers[depth:], maps))

    def class_logits(self, maps: Tensor, depth: int = 0) -> Tensor:
        """Return the class logits, (B, K, H, W), of the (B, C, H, W) map that enters a layer."""
        logits = _run(self.class_layers[depth:], maps)
        return logits if self.select is None else self.select(logits)

    def to(self, device: torch.device) -> None:
        """Move the layers to a device."""
        self.box_layers.to(device)
        self.class_layers.to(device)

    @property
    def shape(self) -> HeadShape:
        """Return the head's shape."""
        boxes, classes = _entering_channels(self.box_layers), _entering_channels(self.class_layers)
        return HeadShape(self.bins, boxes, classes, self.rotated)


def _run(layers: nn.Sequential, maps: Tensor) -> Tensor:
    with torch.autocast(maps.device.type, enabled=False):
        output: Tensor = layers(maps.to(next(layers.parameters()).dtype))
    return output


def _entering_channels(layers: nn.Sequential) -> tuple[int, ...]:
    """Return the channels of the map that enters each layer; 0 for a layer without convolutions."""
    convolutions = ([m for m in layer.modules() if isinstance(m, nn.Conv2d)] for layer in layers.children())
    return tuple(found[0].in_channels if found else 0 for found in convolutions)
