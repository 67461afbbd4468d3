"""The interface of a distillation method, and the registry that finds it by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model
from torch import Tensor, nn

from yolokd.pyramid.level import Level, LevelShape

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]  # the weight of one term of a loss


class Method(nn.Module):
    """One distillation method at one pyramid level: it turns the maps of both models into a scalar loss.

    yolokd builds one instance per level, so a method has no loop over levels; one that has to see all levels of a batch
    together overrides `losses`. Trained parts, such as adapters, are
    ordinary submodules. Constants are keyword-only arguments of `__init__`: `yolokd train NAME.constant=value` sets
    them, and pydantic checks the value against the annotation, for example `Annotated[float, Field(ge=0)]`. A method
    uses tensors only, nothing of Ultralytics, files or settings.

    paper: the method's name and source, as `yolokd methods` prints it. The `wants_…` attributes say which predictions
    `Level` must hold. box_weight: the constant that, at 0, leaves predicted boxes out of the loss; empty if none does.

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
    box_weight: ClassVar[str] = ""
    wants_logits: ClassVar[bool] = False  # class logits of both models
    wants_mean_logits: ClassVar[bool] = False  # the mean of the class logits of the teacher's branches
    wants_boxes: bool = False  # predicted boxes of both models; an instance may set it, by its constants
    wants_box_logits: bool = False  # raw box outputs of both heads; an instance may set it, too
    wants_assigned: bool = False  # the positions that the YOLO loss assigned to objects; an instance may set it, too
    wants_teacher_head: ClassVar[bool] = False  # the teacher's head, as a function of a map
    head_depth: int = 0  # if above 0: the maps that enter this layer of the student's head; an instance may set it
    needs_labels: bool = False  # whether it gets labelled images only, or learns of no others; an instance may set it

    @classmethod
    def wants_scores(cls) -> bool:
        """Return whether the method needs class logits of the teacher, of either kind."""
        return cls.wants_logits or cls.wants_mean_logits

    @classmethod
    def wants_dense_head(cls) -> bool:
        """Return whether the method needs a teacher whose head predicts at every position."""
        return cls.wants_mean_logits or cls.wants_student_head()

    @classmethod
    def wants_student_head(cls) -> bool:
        """Return whether the method needs a student whose head predicts at every position."""
        return cls.wants_logits or cls.wants_boxes or cls.wants_box_logits or cls.wants_teacher_head

    def forward(self, level: Level) -> Tensor:
        """Return the loss of one level, a scalar: a mean over batch, channels and positions, before any gain."""
        raise NotImplementedError

    @classmethod
    def losses(cls, methods: Sequence[Any], levels: Sequence[Level]) -> list[Tensor]:
        """Return the loss of each of the L levels of a batch. methods: L instances of the class, one per level."""
        return [method(level) for method, level in zip(methods, levels, strict=True)]


_REGISTRY: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Return a class decorator that makes a Method available as `method=name`.

    Raises ValueError if the name is "none" or no identifier, since `method=` could not name it.
    """
    if not name.isidentifier() or name == "none":
        raise ValueError(f"a method's name must be an identifier other than 'none', not {name!r}")

    def add(cls: M) -> M:
        _REGISTRY[name] = cls
        return cls

    return add


def registered() -> dict[str, type[Method]]:
    """Return all registered methods by name."""
    return dict(_REGISTRY)


def constants_model(cls: type[Method]) -> type[BaseModel]:
    """Return a pydantic model of a method's constants, made from the keyword-only arguments of its `__init__`."""
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
