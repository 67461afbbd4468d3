"""Checks of single values, by pydantic."""

from __future__ import annotations

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
