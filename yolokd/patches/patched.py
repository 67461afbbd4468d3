"""The few places where Ultralytics leaves no other seam: one of its names, replaced for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def patched(owner: Any, name: str, substitute: Any) -> Iterator[None]:
    """Within it, `owner.name` is the substitute.

    >>> import math
    >>> with stand_in(math, "pi", 3):
    ...     math.pi
    3
    """
    namespace = vars(owner)
    had, theirs = name in namespace, namespace.get(name)  # a module may use a builtin, which is not its own
    setattr(owner, name, substitute)
    try:
        yield
    finally:
        if had:
            setattr(owner, name, theirs)
        else:
            delattr(owner, name)
