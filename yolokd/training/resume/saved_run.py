"""Load what an interrupted run has left, and refuse what cannot continue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ultralytics.utils import LOGGER

from yolokd.config.arguments import as_list
from yolokd.config.parse import split_keys, without_replaced, without_trust
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model
from yolokd.models.detector import Detector
from yolokd.models.origin import origin_of
from yolokd.training.resume.sidecar import State, load_sidecar

# yolokd's keys that a resumed run may be given anew; the content of files is compared later.
CHANGEABLE = frozenset({"teacher", "unlabelled", "report", "trust", "force"})


@dataclass(frozen=True)
class SavedRun:
    """An interrupted run: its last.pt, the keys that it was started with, and its sidecar's content if there is one.

    stripped: whether last.pt is in its final form already. teachers: their SHA-256; None if the run is not yolokd's.
    names: of its classes.
    """

    last: Path
    keys: dict[str, Any]
    state: State | None
    stripped: bool
    teachers: list[str] | None
    names: dict[int, str]

    @property
    def folder(self) -> Path:
        """Return the run's folder: where its checkpoint lies now, whatever path is written inside the checkpoint."""
        return self.last.parent.parent if self.last.parent.name == "weights" else self.last.parent

    @property
    def trained(self) -> bool:
        """Return whether all its epochs are done, so that only the final evaluation remains."""
        return self.state is not None and bool(self.state["stop"])

    def has_teachers(self, sha256: list[str]) -> bool:
        """Return whether the run began with these teachers, as far as is known."""
        return self.teachers is None or self.teachers == sha256


def load_saved_run(keys: Mapping[str, Any]) -> SavedRun:
    """Load the run that `resume=` names.

    Raises UserError if there is nothing to resume, and for a key that cannot change in a resumed run.
    """
    last = Path(str(keys["resume"] if keys["resume"] is not True else keys.get("model")))
    model, checkpoint = load_model(last, "resume", bool(keys.get("trust")))
    epoch = int(checkpoint.get("epoch", -1))
    state = load_sidecar(last, epoch)
    if state is not None and epoch >= 0 and not _is_of_checkpoint(state, model):
        LOGGER.warning(f"resume: the sidecar beside {last} belongs to another run, and is ignored")
        state = None
    finished = epoch < 0 or checkpoint.get("optimizer") is None
    if finished and (state is None or not state["stop"]):
        raise UserError(f"resume={last}", "is finished, nothing to resume", f"start a new run with student={last}")
    saved = dict(checkpoint.get("train_args", {})) | (state["own"] if state is not None else {})
    saved = without_trust(saved, f"resume={last}")
    if not split_keys(saved).distillation:
        saved |= {} if keys.get("teacher") else {"method": "none"}  # a run of plain Ultralytics, unless told otherwise
    elif keys.get("teacher") and not keys.get("method") and saved.get("method") == "none":
        raise UserError(
            "teacher", "would not teach: the run has method=none", "drop it, or give method= and force=True"
        )
    elif keys.get("force"):
        saved = without_replaced(saved, keys)
    else:
        _check_unchanged(keys, saved)
    return SavedRun(last, saved, state, finished, _teachers(model, state), dict(model.names))


def _teachers(model: Detector, state: State | None) -> list[str] | None:
    """Return the SHA-256 of a run's teachers, by its sidecar, or else by the record in its checkpoint."""
    if state is not None:
        return list(state["teachers"])
    return [teacher.sha256 for teacher in origin_of(model).teachers] or None


def _is_of_checkpoint(state: State, model: Detector) -> bool:
    """Return whether a sidecar's averaged weights are those of a checkpoint, which holds them in half precision."""
    averaged, weights = state["ema"]["state"], model.state_dict()
    return averaged.keys() == weights.keys() and all(
        torch.equal(averaged[key].half().nan_to_num(), weights[key].half().nan_to_num()) for key in weights
    )


def _check_unchanged(keys: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in split_keys(keys).distillation.items():
        is_new = key == "unlabelled" and (value is None) != (saved.get(key) is None)
        if is_new or (key not in CHANGEABLE and as_list(saved.get(key)) != as_list(value)):
            raise UserError(key, "cannot change in a resumed run", "start a new run, drop it, or give force=True")
