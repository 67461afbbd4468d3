"""Checks by pydantic, whose errors become user errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from yolokd.errors import UserError


def validate(key: str, value: object, kind: Any, problem: str, cure: str) -> Any:
    """Return `value` if it strictly is of the type `kind`, which may be any that pydantic knows.

    Raises UserError, naming `key`, with the problem and the cure given.

    >>> from pydantic import PositiveInt
    >>> validate("rounds", 7, PositiveInt, "must be a whole number of at least 1", "for example rounds=7")
    7
    """
    try:
        return TypeAdapter(kind).validate_python(value, strict=True)
    except ValidationError as e:
        raise UserError(f"{key}={value}", problem, cure) from e


def as_user_error(error: ValidationError, values: Mapping[str, Any], prefix: str = "") -> UserError:
    """Return a UserError for the first wrong value. values: those that were checked. prefix: of their keys (`dfd.`)."""
    first = error.errors()[0]
    key = str(first["loc"][0]) if first["loc"] else ""
    return UserError(f"{prefix}{key}={values.get(key)}", "not a valid value", first["msg"])
