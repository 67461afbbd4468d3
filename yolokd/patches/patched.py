"""The tool that replaces an attribute for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, replacement: Any) -> Iterator[None]:
    """Replace the attribute `name` of a module or object by `replacement` inside the block.

    >>> import math
    >>> with patched(math, "pi", 3):
    ...     math.pi
    3
    """
    namespace = vars(owner)
    existed, original = name in namespace, namespace.get(name)  # a builtin that a module uses is not in its namespace
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if existed:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
