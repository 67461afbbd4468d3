"""What `bench` and `compare` set side by side: methods, plain training, and Ultralytics' own distillation."""

from __future__ import annotations

from collections.abc import Iterable

from yolokd.config.arguments import as_list
from yolokd.config.parse import is_yolokd_key, method_names
from yolokd.errors import UserError

PLAIN = "none"
NATIVE = "native"  # Ultralytics' own `distill_model`, in its own trainer
DEFAULT_METHODS = "none,native,sl2,dfd,pdf,dfd+pdf,fitnet+pdf"  # set side by side unless `method=` says otherwise


def parse_candidates(method: object, keys: Iterable[str]) -> list[str]:
    """The contenders of `a,b+c,native`, in their order.

    Raises UserError for an unknown method, and for a key that is a constant of none of them.
    """
    asked = [str(m) for m in as_list(method)]
    try:
        names = [name for m in asked if m != NATIVE for name in method_names(m)]
    except UserError as e:
        raise UserError(e.argument, e.problem, f"{NATIVE}, or {e.cure}") from e
    for key in keys:
        if "." in key and key.partition(".")[0] not in names:
            raise UserError(key, "sets a constant of no method here", f"methods: {', '.join(names) or PLAIN}")
    return asked


def setting_applies(key: str, method: str) -> bool:
    """Whether a setting is one that a method has: plain training and Ultralytics' own have none of yolokd's."""
    return not is_yolokd_key(key) if method in (PLAIN, NATIVE) else constant_applies(key, method)


def constant_applies(key: str, method: str) -> bool:
    """Whether a key may go to a method: a constant only to those that have it."""
    return "." not in key or key.partition(".")[0] in method.split("+")
