"""No file runs code: neither a checkpoint's pickle nor a data set's download script, unless trusted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from ultralytics.data import utils
from ultralytics.nn import tasks
from ultralytics.utils import ROOT

from yolokd.errors import UserError
from yolokd.patches.patched import patched


@contextmanager
def safe_loading(trust: bool = False) -> Iterator[None]:
    """Within it, Ultralytics rebuilds checkpoints from known classes alone, and runs download scripts of its own alone.

    `trust=True` leaves its ordinary (unrestricted) ways in force. Holds for the whole process: not for threads side by
    side. Raises UserError, within, for a data set whose images are missing and whose `download:` is code.
    """
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise UserError("torch", f"{torch.__version__} cannot load checkpoints safely", "install torch >= 2.6")
    if trust:
        with patched(tasks, "SAFE_LOAD", False):
            yield
        return
    subprocess = SimpleNamespace(run=_refuse)
    with patched(tasks, "SAFE_LOAD", True), patched(utils, "exec", _exec), patched(utils, "subprocess", subprocess):
        yield


def _refuse(*_: Any, **__: Any) -> None:
    raise UserError("data", "its images are missing, and its download: is code", "fetch them, or trust=True runs it")


def _exec(code: str, scope: dict[str, Any]) -> None:
    """Run what Ultralytics ships, such as coco.yaml's own script."""
    if ROOT.resolve() not in Path(scope["yaml"]["yaml_file"]).resolve().parents:
        _refuse()
    exec(code, scope)
