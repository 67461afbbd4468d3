"""Compare a resumed run with what it began with."""

from __future__ import annotations

from typing import Any

import torch

from yolokd.errors import UserError
from yolokd.training.plan import TrainPlan
from yolokd.training.resume.saved_run import SavedRun


def check_same_run(plan: TrainPlan, saved_run: SavedRun) -> None:
    """Raise UserError if a resumed run has another teacher or other classes than it began with, unless force=True.

    Another number of classes is refused with force=True, too: the student's head has as many outputs.
    """
    names = dict(plan.data["names"])
    if len(names) != len(saved_run.names):
        cure = f"start a new run with student={saved_run.last}"
        raise UserError("data", f"has {len(names)} classes, and the run began with {len(saved_run.names)}", cure)
    if plan.config.force:
        return
    if not saved_run.has_teachers([paired.sha256 for paired in plan.teachers]):
        raise UserError("teacher", "is another than the run began with", "give that one, or force=True")
    if names != saved_run.names:
        raise UserError("data", "has other classes than the run began with", "give that set, or force=True")


def teacher_precisions(saved_run: SavedRun | None, plan: TrainPlan, device: torch.device) -> list[Any]:
    """Return a precision for each teacher: what the run began with if it resumes on the same kind of device."""
    state = saved_run.state if saved_run is not None else None
    saved = list(state["precisions"]) if state is not None and state["device"] == device.type else []
    count = len(plan.teachers)
    return saved if len(saved) == count else [plan.config.teacher_precision] * count
