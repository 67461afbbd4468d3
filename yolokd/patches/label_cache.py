"""Loading of label caches without running code from them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.data import dataset

from yolokd.patches.patched import patched

# What a pickle of arrays, strings and numbers refers to. NumPy 1 and 2 name the same functions differently.
ALLOWED = frozenset(
    (module, name)
    for core in ("numpy.core", "numpy._core")
    for module, name in (
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        (f"{core}.multiarray", "_reconstruct"),
        (f"{core}.multiarray", "scalar"),
        (f"{core}.numeric", "_frombuffer"),
    )
)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of arrays, strings, numbers and containers of these; it knows no other function or class."""

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed function or class. Raises UnpicklingError for any other."""
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a label cache")
        return super().find_class(module, name)


@contextmanager
def safe_label_caches() -> Iterator[None]:
    """Read `labels/*.cache` inside the block without running code; a cache that holds code is scanned anew.

    Replaces: `data.dataset.load_dataset_cache_file`.
    Why: a cache lies beside the labels, in a folder that may come from a stranger. It is a pickle, which can run any
    code, and Ultralytics loads it with `allow_pickle=True`.
    Unnecessary once: Ultralytics stores label caches as plain data.
    """
    with patched(dataset, "load_dataset_cache_file", load_label_cache):
        yield


def load_label_cache(path: str | Path) -> Any:
    """Return the dictionary in a label cache, a pickle of an object array inside a .npy file.

    Raises UnpicklingError if it holds anything but arrays, strings, numbers and containers of these; ValueError if it
    is not such a file.
    """
    with open(path, "rb") as f:
        version = np.lib.format.read_magic(f)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read_header[version](f)
        if shape != () or dtype != np.dtype(object):
            raise ValueError(f"{path} is not a label cache")
        return _ArrayUnpickler(f).load().item()
