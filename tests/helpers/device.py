"""export/detect.py, loaded as a module."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from yolokd.runtime.resources import bundled_folder

SCRIPT = bundled_folder("export") / "detect.py"


def load(path: Path) -> ModuleType:
    """Import a Python file as the module `detect`."""
    spec = importlib.util.spec_from_file_location("detect", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["detect"] = module  # dataclasses looks up the names in annotations there
    spec.loader.exec_module(module)
    return module


detect = load(SCRIPT)
