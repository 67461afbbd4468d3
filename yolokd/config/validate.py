"""Checks by pydantic, whose errors become user errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from yolokd.errors import UserError, first_problem


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
    place, problem = first_problem(error)
    key = str(place[0]) if place else ""
    return UserError(f"{prefix}{key}={values.get(key)}", "not a valid value", problem)
