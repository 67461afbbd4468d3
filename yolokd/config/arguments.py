"""Parsing of `key=value` arguments, and suggestions for mistyped names."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Iterable
from typing import Any

import yaml

from yolokd.errors import UserError


def parse_value(text: str) -> Any:
    """Convert the text of a command line value to a Python value; return it unchanged if it is no literal.

    >>> [parse_value(v) for v in ("0.5", "True", "none", "[0, 1]", "a b.pt", "{person: man, sports car: car}")]
    [0.5, True, None, [0, 1], 'a b.pt', {'person': 'man', 'sports car': 'car'}]
    """
    constants = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return _parse_mapping(text)


def _parse_mapping(text: str) -> Any:
    """Convert `{name: name, …}`, whose names need no quotes, as YAML does; return other text unchanged."""
    if not (text.startswith("{") and text.endswith("}")):
        return text
    try:
        return yaml.load(text, yaml.BaseLoader)  # which makes no numbers or booleans of names such as `no`
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def as_list(value: object) -> list[Any]:
    """Convert to a list: a list or tuple, text with commas between its items, with or without brackets, or one value.

    >>> as_list("a, b"), as_list("[a.pt, b.pt]"), as_list((1, 2)), as_list(3)
    (['a', 'b'], ['a.pt', 'b.pt'], [1, 2], [3])
    """
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        items = value[1:-1] if value.startswith("[") and value.endswith("]") else value
        return [item.strip().strip("'\"") for item in items.split(",")]
    return [value]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `did you mean X?` with the known name that is closest, or '' if none is close.

    >>> did_you_mean("epoch", ["epochs", "batch"])
    'did you mean epochs?'
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {matches[0]}?" if matches else ""


def check_known(keys: Iterable[str], known: Collection[str], cure: str) -> None:
    """Raise UserError for the first key that is not known. cure: what to say if no known key is similar."""
    for key in keys:
        if key not in known:
            raise UserError(key, "unknown key", did_you_mean(key, known) or cure)
