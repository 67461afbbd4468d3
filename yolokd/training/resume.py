"""Exact resumes: all that a training is at the end of an epoch, beside last.pt, and back again.

Ultralytics' own checkpoint holds a float16 average of the weights and of the optimizer's state, and no random stream.
The sidecar holds the rest in full precision, as tensors and plain data that load without running code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolokd.config.parse import is_yolokd_key, method_names
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model
from yolokd.training.sidecar import State, load_sidecar


@dataclass(frozen=True)
class Resumption:
    """A run to go on with: its checkpoint, the keys that it was started with, and its sidecar, where there is one."""

    last: Path
    keys: dict[str, Any]
    state: State | None

    @property
    def trained(self) -> bool:
        """Whether all its epochs are done, and the final evaluation alone is left."""
        return self.state is not None and bool(self.state["stop"])


def load_resumption(keys: Mapping[str, Any]) -> Resumption:
    """What `resume=` goes on with.

    Raises UserError where there is nothing to resume, and for settings that cannot change on the way.
    """
    last = Path(str(keys["resume"] if keys["resume"] is not True else keys.get("model")))
    _, checkpoint = load_model(last, "resume", bool(keys.get("trust")))
    state = load_sidecar(last, int(checkpoint.get("epoch", -1)))
    finished = checkpoint.get("epoch", -1) < 0 or checkpoint.get("optimizer") is None
    if finished and (state is None or not state["stop"]):
        raise UserError(f"resume={last}", "is finished, nothing to resume", f"start a new run with student={last}")
    saved = dict(checkpoint.get("train_args", {})) | (state["own"] if state is not None else {})
    if not any(map(is_yolokd_key, saved)):
        saved |= {} if keys.get("teacher") else {"method": "none"}  # a run of plain Ultralytics, unless told otherwise
    elif keys.get("teacher") and not keys.get("method") and saved.get("method") == "none":
        raise UserError("teacher", "would not teach: the run has method=none", "drop it, or give method= and force=")
    elif keys.get("force"):
        names = method_names(keys.get("method") or saved["method"])
        saved = {k: v for k, v in saved.items() if "." not in k or k.partition(".")[0] in names}
    else:
        _check_unchanged(keys, saved)
    return Resumption(last, saved, state)


def _check_unchanged(keys: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in keys.items():
        if is_yolokd_key(key) and key not in {"teacher", "trust", "force"} and saved.get(key) != value:
            raise UserError(key, "cannot change in a resumed run", "start a new run, drop it, or give force=True")
