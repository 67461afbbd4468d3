"""Words of a command line as values, and what a mistyped one may have meant."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from typing import Any


def parse_value(text: str) -> Any:
    """A command line value as Python sees it, plain text where it is no literal.

    >>> [parse_value(v) for v in ("0.5", "True", "none", "[0, 1]", "a b.pt")]
    [0.5, True, None, [0, 1], 'a b.pt']
    """
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def as_list(value: object) -> list[Any]:
    """Several values as a list: of a sequence, of text joined by commas, or of one value alone.

    >>> listed("a, b"), listed((1, 2)), listed(3)
    (['a', 'b'], [1, 2], [3])
    """
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        return [word.strip() for word in value.split(",")]
    return [value]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the closest known word, or '' where none is close.

    >>> nearest("epoch", ["epochs", "batch"])
    'did you mean epochs?'
    """
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]}?" if match else ""
