"""The defaults that ship in cfg/: of yolokd's own keys, and of each method's constants."""

from __future__ import annotations

from functools import cache
from typing import Any

import yaml

from yolokd.methods import constants_model, registered
from yolokd.runtime.bundled import bundled_folder


@cache
def defaults() -> dict[str, Any]:
    """Return the content of cfg/default.yaml."""
    return _read("default.yaml")


def method_defaults(name: str) -> dict[str, Any]:
    """Return a method's gain and constants: from cfg/methods/NAME.yaml, or from a user's own class."""
    if (bundled_folder("cfg") / "methods" / f"{name}.yaml").is_file():
        return _read(f"methods/{name}.yaml")
    fields = constants_model(registered()[name]).model_fields
    return {"gain": 1.0} | {k: f.default for k, f in fields.items() if not f.is_required()}


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((bundled_folder("cfg") / name).read_text(encoding="utf-8"))
    return content
