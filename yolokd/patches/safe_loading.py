"""Loading of models and data sets without running code from them."""

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
from yolokd.patches.label_cache import safe_label_caches
from yolokd.patches.no_autoinstall import no_autoinstall
from yolokd.patches.no_ghostscript import no_ghostscript
from yolokd.patches.patched import patched
from yolokd.patches.safe_models import safe_models
from yolokd.runtime.plots import import_matplotlib


@contextmanager
def safe_loading(trust: bool = False) -> Iterator[None]:
    """Load models and data sets inside the block without running code from them; `trust=True` allows the code.

    What models may hold, `safe_models` says. A label cache may hold plain data only. A data set's `download:` may be an
    archive's address, or the Python code of a data set that Ultralytics ships; other code and shell commands do not
    run. No file makes Ultralytics install a package, Pillow run Ghostscript, or matplotlib run LaTeX.
    The replacements hold for the whole process: do not use this in two threads at once.
    Raises UserError if torch is too old for restricted loading and, inside the block, for a data set whose images are
    missing and whose `download:` is refused.

    Replaces: the names `exec` and `subprocess` in `data.utils`.
    Why: a download script can run any code, and Ultralytics always runs it.
    Unnecessary once: `check_det_dataset` takes an argument that forbids scripts.
    """
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        raise UserError("torch", f"{torch.__version__} cannot load checkpoints safely", "install torch >= 2.6")
    if trust:
        with patched(tasks, "SAFE_LOAD", False):
            yield
        return
    import_matplotlib()
    subprocess = SimpleNamespace(run=_refuse)
    with (
        safe_models(),
        patched(utils, "exec", _exec),
        patched(utils, "subprocess", subprocess),
        safe_label_caches(),
        no_ghostscript(),
        no_autoinstall(),
    ):
        yield


def _refuse(*_: Any, **__: Any) -> None:
    cure = "download the images yourself, or give trust=True to run it"
    raise UserError("data", "its images are missing, and its download: is code", cure)


def _exec(code: str, scope: dict[str, Any]) -> None:
    """Run a data set's download script if Ultralytics ships its .yaml, such as coco.yaml; raise UserError otherwise."""
    if ROOT.resolve() not in Path(scope["yaml"]["yaml_file"]).resolve().parents:
        _refuse()
    exec(code, scope)
