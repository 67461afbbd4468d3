"""When the optimizer steps, and how gradients are clipped before it."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from yolokd.distillation.nonfinite import NonFiniteGuard
from yolokd.runtime.distributed import all_reduce_mean

MAX_NORM = 10.0  # Ultralytics' own bound on the gradient norm


class StepAfterEveryBatch(int):
    """A trainer's `accumulate`: a number that makes Ultralytics' loop call `optimizer_step` after every batch.

    The loop compares the batches since the last step, which it counts in a local variable, with `accumulate`. A resume
    would lose that count. So every comparison succeeds here, and OptimizerSteps counts instead.
    """

    def __le__(self, _count: int) -> bool:
        return True


class OptimizerSteps:
    """Counts the batches between two optimizer steps, and makes the steps of a distilling run.

    pending: the number of batches whose gradients wait for the optimizer. norms: one for each step since they were last
    read: the norm of the student's gradient, before it was clipped.
    """

    def __init__(self) -> None:
        self.pending = 0
        self.norms: list[torch.Tensor] = []

    def is_due(self, accumulate: int) -> bool:
        """Count a batch; return whether `accumulate` of them are in, and start counting anew if so."""
        self.pending += 1
        if self.pending < accumulate:
            return False
        self.pending = 0
        return True

    def step(self, trainer: Any, adapters: Sequence[nn.Parameter], guard: NonFiniteGuard) -> None:
        """Step as Ultralytics' `optimizer_step` does, but clip adapters and student each by their own norm.

        In a joint norm, large adapter gradients would shrink the student's step.
        guard: counts the steps that a gradient scaler skips.
        """
        adapter_ids = {id(parameter) for parameter in adapters}
        student = [parameter for parameter in trainer.model.parameters() if id(parameter) not in adapter_ids]
        trainer.scaler.unscale_(trainer.optimizer)
        norm = clip_grad_norm_(student, max_norm=MAX_NORM)
        clip_grad_norm_(adapters, max_norm=MAX_NORM)
        self.norms.append(norm)
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        if trainer.scaler.is_enabled():
            guard.after_step(norm)
            _lower_scale(trainer.scaler, guard, norm.device)
        trainer.optimizer.zero_grad()
        if trainer.ema:
            trainer.ema.update(trainer.model)

    def mean_clip_coefficient(self) -> float:
        """Return the mean clip coefficient since the last call; 1 if no step was made."""
        norms, self.norms = torch.stack(self.norms).tolist() if self.norms else [], []
        coefficients = [min(1.0, MAX_NORM / (norm + 1e-6)) for norm in norms if isfinite(norm)]
        return sum(coefficients) / len(coefficients) if coefficients else 1.0

    def restart(self, accumulate: int) -> None:
        """Forget measurements and step at the next batch, as Ultralytics' loop does after a recovery from NaN."""
        self.norms = []
        self.pending = accumulate


def _lower_scale(scaler: torch.amp.GradScaler, guard: NonFiniteGuard, device: torch.device) -> None:
    """Lower the scale if a gradient of the distillation overflowed: it was dropped, so the scaler did not see it.

    All processes take the same scale. No value is read, so that the host does not wait for a GPU.
    """
    overflowed, guard.overflowed = guard.overflowed, None
    if overflowed is None:
        return
    overflowed = all_reduce_mean(overflowed.float()) > 0
    scale = scaler.scale(torch.ones((), device=device))
    scaler.update(torch.where(overflowed, scale * scaler.get_backoff_factor(), scale))
