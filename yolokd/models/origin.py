"""Where a checkpoint comes from: the record that a training of yolokd leaves in the student."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import torch
import ultralytics
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    field_validator,
)
from torch import nn

from yolokd.version import __version__

T = TypeVar("T")
NotEmpty = Annotated[T, Field(min_length=1)]  # a record holds an empty value for a setting that was not given


class TeacherOrigin(BaseModel):
    """A teacher: the name of its file, its SHA-256, and the precision in which it ran; weights: of a timm backbone."""

    model_config = ConfigDict(frozen=True)
    file: str
    sha256: str
    precision: str = ""
    weights: str | None = None


class Origin(BaseModel):
    """The parts of a record that yolokd reads again; those that are missing or have a wrong type count as not given.

    A stranger's checkpoint may hold anything under this name.
    """

    model_config = ConfigDict(frozen=True)
    teachers: list[TeacherOrigin] = Field([], alias="teacher")
    method: str = ""
    classes_map: NotEmpty[dict[str, str]] | None = None
    teacher_channels: NotEmpty[list[int]] | None = None
    versions: dict[str, str] = {}

    @field_validator("teachers", mode="before")
    @classmethod
    def _one_as_list(cls, value: object) -> object:
        return value if isinstance(value, list) else [value]

    @field_validator("*", mode="wrap")
    @classmethod
    def _drop_invalid(cls, value: object, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            return cls.model_fields[str(info.field_name)].get_default()


def record_of(model: nn.Module) -> dict[str, Any]:
    """Return the whole record of a checkpoint's model; empty if yolokd did not train it."""
    record = getattr(model, "yolokd", None)
    return record if isinstance(record, dict) else {}


def origin_of(model: nn.Module) -> Origin:
    """Return where a checkpoint's model comes from, as far as its record says."""
    return Origin.model_validate(record_of(model))


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a training depends on."""
    return {"yolokd": __version__, "ultralytics": ultralytics.__version__, "torch": str(torch.__version__)}
