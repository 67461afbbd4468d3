"""The interface of a distillation method, and the registry that finds it by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor, nn

from yolokd.pyramid.level import Level, LevelShape

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # of a term of a loss


class Method(nn.Module):
    """One method at one pyramid level: maps (and class logits) in, one scalar loss out.

    A method is built once per level, so it needs no loop of its own; its trained parts (adapters, …) are ordinary
    submodules. Its constants are keyword-only arguments of `__init__`: `yolokd train NAME.constant=value` sets them,
    and their annotations (pydantic's, so `Annotated[float, Field(ge=0)]` works) say what is valid. It knows tensors
    only.

    >>> import torch.nn.functional as F
    >>> from yolokd.methods.blocks import Adapter
    >>> @register("plain")
    ... class Plain(Method):
    ...     def __init__(self, shape, *, power: float = 2.0):
    ...         super().__init__()
    ...         self.adapt, self.power = Adapter(shape), power
    ...
    ...     def forward(self, level):
    ...         return (self.adapt(level.student).float() - level.teacher.float()).abs().pow(self.power).mean()
    """

    paper: ClassVar[str] = ""
    wants_logits: ClassVar[bool] = False  # whether `Level` must carry both models' class logits
    wants_mean_logits: ClassVar[bool] = False  # whether it must carry the mean of the teacher's branches
    wants_boxes: bool = False  # whether it must carry both models' predicted boxes; may depend on constants

    @classmethod
    def wants_scores(cls) -> bool:
        """Whether the teacher's head must give class scores, of whatever kind."""
        return cls.wants_logits or cls.wants_mean_logits

    def forward(self, level: Level) -> Tensor:
        """The level's loss: a scalar mean over batch, channels and positions, unscaled by any gain."""
        raise NotImplementedError


_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator that makes a Method available as `method=name`.

    Raises ValueError for a name that `method=` could not spell.
    """
    if not name.isidentifier() or name == "none":
        raise ValueError(f"a method's name must be an identifier other than 'none', not {name!r}")

    def add(cls: M) -> M:
        _REGISTRY[name] = cls
        return cls

    return add


def registered() -> dict[str, type[Method]]:
    """The known methods by name."""
    return dict(_REGISTRY)


def constants_model(cls: type[Method]) -> type[BaseModel]:
    """The pydantic model of a method's constants, read off the keyword-only arguments of its `__init__`."""
    parameters = inspect.signature(cls.__init__, eval_str=True).parameters.values()
    fields: dict[str, Any] = {
        p.name: (
            Any if p.annotation is p.empty else p.annotation,
            ... if p.default is p.empty else p.default,
        )
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }
    return create_model(f"{cls.__name__}Constants", __config__=ConfigDict(extra="forbid"), **fields)


__all__ = ["Level", "LevelShape", "Method", "constants_model", "register", "registered"]
