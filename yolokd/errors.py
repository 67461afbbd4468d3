"""The error that reports a user's mistake."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

MAX_SHOWN = 300  # characters of an argument, and of a problem, in a message


class UserError(ValueError):
    """A mistake in the user's input; the message names argument, problem and cure in one line.

    The CLI prints it without a traceback and exits with status 2.

    >>> str(UserError("method=dfx", "no such method", "one of: dfd, pdf"))
    'method=dfx: no such method (one of: dfd, pdf)'
    """

    def __init__(self, argument: str, problem: str, cure: str) -> None:
        self.argument, self.problem, self.cure = argument, problem, cure
        super().__init__(" ".join(f"{_shorten(argument)}: {_shorten(problem)} ({cure})".split()))


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message without Ultralytics' prefix, or its type if it has no message.

    >>> first_line(ValueError("no such thing\\nand a long story"))
    'no such thing'
    """
    text = str(error).strip().removeprefix("ERROR ❌️ ")
    return text.splitlines()[0] if text else type(error).__name__


def first_problem(error: ValidationError) -> tuple[tuple[str | int, ...], str]:
    """Return where the first wrong value is, and what pydantic says about it."""
    first = error.errors(include_url=False, include_input=False)[0]
    return first["loc"], first["msg"].removeprefix("Value error, ")


def describe_invalid(error: ValidationError, name: str = "") -> str:
    """Return what is wrong with the first wrong value: where it is, and what pydantic says about it.

    name: of the value that was checked, if it is part of another.
    """
    place, problem = first_problem(error)
    path = ".".join(str(part) for part in (name, *place) if part not in {"", "[key]"})
    return f"its {path or 'content'}: {problem}"
