"""What keys mean, read from the comments beside their defaults in a settings file; starts without torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from yolokd.runtime.bundled import bundled_folder

KEY_LINE = re.compile(r"(?P<name>\w+):(?P<default>.*?)\s#\s*(?P<meaning>.*)")  # key: default  # meaning
CONTINUATION = re.compile(r"\s+#\s*(?P<meaning>.*)")  # an indented comment alone goes on with the meaning above it
TYPE = re.compile(r"^\([^)]*\)\s*")  # Ultralytics begins a meaning with the value's type: (int, optional)


@dataclass(frozen=True)
class Key:
    """A key of a command, its default as text, and its meaning in one line."""

    name: str
    default: str
    meaning: str


@cache
def yolokd_keys() -> dict[str, Key]:
    """Return the keys of cfg/default.yaml by name."""
    return read_descriptions((bundled_folder("cfg") / "default.yaml").read_text(encoding="utf-8"))


@cache
def ultralytics_keys() -> dict[str, Key]:
    """Return the keys of Ultralytics' own default.yaml by name, without importing Ultralytics."""
    package = find_spec("ultralytics")
    assert package is not None
    assert package.origin is not None
    return read_descriptions((Path(package.origin).parent / "cfg" / "default.yaml").read_text(encoding="utf-8"))


def read_descriptions(text: str) -> dict[str, Key]:
    """Return the keys of a settings file's text, in its order.

    >>> read_descriptions("stages: null  # (list) epochs at which\\n              # a teacher begins")
    {'stages': Key(name='stages', default='none', meaning='epochs at which a teacher begins')}
    """
    keys: dict[str, Key] = {}
    for line in text.splitlines():
        if match := KEY_LINE.fullmatch(line):
            name, meaning = match["name"], TYPE.sub("", match["meaning"])
            keys[name] = Key(name, _as_typed(match["default"]), meaning)
        elif keys and (match := CONTINUATION.fullmatch(line)):
            last = next(reversed(keys.values()))
            keys[last.name] = Key(last.name, last.default, f"{last.meaning} {match['meaning']}")
    return keys


def _as_typed(default: str) -> str:
    """Return a default as a user would type it on the command line: `none` for YAML's null."""
    value = yaml.safe_load(default)
    return "none" if value is None else str(value)
