"""export/detect.py, loaded as a module, and comparisons of detections."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from yolokd.runtime.bundled import bundled_folder

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


def as_array(detections: list[Any]) -> np.ndarray:
    """Return detections as (n, 6): box, score, class."""
    return np.array([[*d.box, d.score, d.class_id] for d in detections]).reshape(-1, 6)


def assert_same(found: np.ndarray, expected: np.ndarray, pixels: float = 0.01, score: float = 1e-4) -> None:
    """Compare rows of detections, best first; two rows may change places if rounding decides which scores higher."""
    assert found.shape == expected.shape
    assert np.abs(found[:, 4] - expected[:, 4]).max(initial=0) < score
    partners = np.abs(found[:, None] - expected[None]).sum(2).argmin(0) if len(found) else np.arange(0)
    assert sorted(partners) == list(range(len(found)))
    found = found[partners]
    assert (found[:, 5] == expected[:, 5]).all()
    assert np.abs(found[:, 4] - expected[:, 4]).max(initial=0) < score
    assert np.abs(found[:, :4] - expected[:, :4]).max(initial=0) < pixels
