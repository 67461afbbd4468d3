"""The methods of a run, built at every level, and their adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolokd.config.schema import AdapterKind, MethodConfig
from yolokd.methods import Method, registered
from yolokd.methods.blocks import Adapter, ChannelAdapter
from yolokd.pyramid.level import Level, LevelShape


def needs_labels(method: nn.Module) -> bool:
    """Return whether a method, built at every level, learns from labelled images alone."""
    return any(module.needs_labels for module in method.modules() if isinstance(module, Method))


class PerLevel(nn.ModuleList):
    """One method at every level: L levels in, L scalar losses out."""

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        """Return each level's unscaled loss."""
        method: Any = type(self[0])
        losses: list[Tensor] = method.losses(list(self), levels)
        return losses


def build_methods(
    configs: Sequence[MethodConfig], levels: Sequence[LevelShape], seed: int, adapter: AdapterKind = "conv"
) -> nn.ModuleList:
    """Return a PerLevel for each method, initialized from a random generator of their own.

    So a seed gives the student the same initial weights and augmentations with every method. All other parts of a
    method begin with the same weights for either `adapter`.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        built = [
            PerLevel(registered()[config.name](shape, **config.constants) for shape in levels) for config in configs
        ]
    for at_one_level in zip(*built, strict=True):
        _share_adapters(at_one_level)
    methods = nn.ModuleList(built)
    if adapter == "identity_if_equal":
        _drop_equal_adapters(methods)
    return methods


def _share_adapters(methods: Sequence[nn.Module]) -> None:
    """Let the methods of one level share their first adapters of equal shape, so that the map is computed once."""
    shared: dict[torch.Size, Adapter] = {}
    for method in methods:
        adapters = ((name, child) for name, child in method.named_children() if isinstance(child, Adapter))
        name, adapter = next(adapters, ("", None))
        if adapter is not None:
            setattr(method, name, shared.setdefault(adapter.weight.shape, adapter))


def _drop_equal_adapters(methods: nn.ModuleList) -> None:
    """Replace adapters between equal channels by identities; methods that shared an adapter share its identity."""
    identities: dict[nn.Module, nn.Identity] = {}
    for module in list(methods.modules()):
        for name, child in module.named_children():
            if isinstance(child, ChannelAdapter) and child.in_channels == child.out_channels:
                setattr(module, name, identities.setdefault(child, nn.Identity()))
