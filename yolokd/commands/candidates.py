"""The candidates that `bench` and `compare` set side by side: methods, plain training, Ultralytics' distillation."""

from __future__ import annotations

from collections.abc import Iterable

from yolokd.config.arguments import as_list
from yolokd.config.parse import is_yolokd_key, method_names
from yolokd.errors import UserError

PLAIN = "none"  # training without a teacher
NATIVE = "native"  # Ultralytics' own `distill_model`, in its own trainer
DEFAULT_METHODS = "none,native,sl2,dfd,pdf,dfd+pdf,fitnet+pdf"  # set side by side unless `method=` says otherwise


def parse_candidates(method: object, keys: Iterable[str]) -> list[str]:
    """Return the candidates in `a,b+c,native`, in their order.

    keys: the command's other keys. Raises UserError for an unknown method, and for a key that sets a constant of a
    method that is not among the candidates.

    >>> parse_candidates("none,dfd+pdf,native", ["dfd.alpha", "epochs"])
    ['none', 'dfd+pdf', 'native']
    """
    candidates = [str(m) for m in as_list(method)]
    try:
        names = [name for candidate in candidates if candidate != NATIVE for name in method_names(candidate)]
    except UserError as e:
        raise UserError(e.argument, e.problem, f"{NATIVE}, or {e.cure}") from e
    for key in keys:
        if "." in key and key.partition(".")[0] not in names:
            raise UserError(key, "sets a constant of no method here", f"methods: {', '.join(names) or PLAIN}")
    return candidates


def setting_applies(key: str, method: str) -> bool:
    """Return whether a method uses a setting: plain training and Ultralytics' distillation use none of yolokd's.

    >>> [setting_applies(key, "none") for key in ("epochs", "balance")]
    [True, False]
    """
    return not is_yolokd_key(key) if method in (PLAIN, NATIVE) else constant_applies(key, method)


def constant_applies(key: str, method: str) -> bool:
    """Return whether a key may be passed to a method; a method's constant may not be passed to another method.

    >>> [constant_applies(key, "dfd+pdf") for key in ("dfd.alpha", "mgd.ratio", "balance")]
    [True, False, True]
    """
    return "." not in key or key.partition(".")[0] in method.split("+")
