"""The tools that replace an attribute: for a while, or whenever it is set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


class Converted:
    """Makes an attribute keep `convert(owner, value)` whenever `value` is assigned to it.

    >>> class Shelf:
    ...     books = Converted(lambda _, titles: sorted(titles))
    >>> shelf = Shelf()
    >>> shelf.books = ["Ulysses", "Emma"]
    >>> shelf.books
    ['Emma', 'Ulysses']
    """

    def __init__(self, convert: Callable[[Any, Any], Any]) -> None:
        self._convert = convert

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, _owner: type | None = None) -> Any:
        try:
            return vars(instance)[self._name]
        except KeyError as e:
            raise AttributeError(self._name) from e

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self._name] = self._convert(instance, value)
