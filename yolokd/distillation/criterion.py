"""The seam: YOLO loss + sum of gain x method(levels), in the place of the student's own criterion."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolokd.config.schema import DistillationConfig
from yolokd.distillation.gradients import GradientRecorder
from yolokd.distillation.nonfinite import NonFiniteGuard
from yolokd.distillation.stage import Stage
from yolokd.errors import UserError
from yolokd.models.detector import Detector
from yolokd.models.teacher import Teacher
from yolokd.pyramid.pairing import Pairing

Losses = tuple[Tensor, dict[str, Tensor]]


class DistillationCriterion(nn.Module):
    """Computes the student's YOLO loss and adds the distillation losses of every paired level.

    It is a submodule of the student, so that optimizer, DDP and device moves see its adapters; yet it adds nothing to
    the student's state_dict, and keeps student and teacher out of its own submodules.
    """

    def __init__(
        self, student: Detector, teachers: Sequence[tuple[Teacher, Pairing]], config: DistillationConfig, seed: int
    ) -> None:
        super().__init__()
        self._student = weakref.ref(student)
        self._base: Any = None
        self.config, self._seed = config, seed
        self.stages = nn.ModuleList(Stage(*paired, config, seed, k) for k, paired in enumerate(teachers))
        strides = sorted({shape.stride for _, pairing in teachers for shape in pairing.levels})
        self.probe = GradientRecorder([part.name for part in config.method_configs], strides)
        self.guard = NonFiniteGuard([part.name for part in config.method_configs])
        self.begin_epoch(0, epochs=1, steps=1)
        self.register_load_state_dict_post_hook(_ignore_missing_criterion_keys)  # type: ignore[no-untyped-call]

    def begin_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Say which epoch of how many begins, of how many steps: schedules and stages are told in epochs.

        Told anew each time, because Ultralytics changes both on the way (`time=`, a batch that was too large).
        """
        self._epochs, self._steps = epochs, steps
        self._step = epoch * steps  # a plain number: reading a tensor's value would make a GPU wait

    @property
    def base(self) -> Any:
        """Ultralytics' own criterion, built on first use: class weights are set on the student after attachment."""
        if self._base is None:
            student = self._student()
            assert student is not None
            self._base = student.init_criterion()
        return self._base

    @base.setter
    def base(self, criterion: Any) -> None:
        self._base = criterion

    def update(self) -> None:
        """Forward the end of an epoch: end-to-end losses change their mix."""
        if hasattr(self.base, "update"):
            self.base.update()

    @property
    def stage(self) -> Stage:
        """The stage of the present step: one teacher is at work at a time."""
        started = sum(start <= self._epoch for start in self.config.starts(self._epochs))
        stage: Stage = self.stages[started - 1]  # type: ignore[assignment]
        return stage

    @property
    def _epoch(self) -> float:
        return self._step / self._steps

    def _factors(self) -> list[float]:
        """Each method's schedule at the present step."""
        return [part.schedule.factor(self._epoch, self._epochs) for part in self.config.method_configs]

    def start_teacher(self, images: Tensor) -> None:
        """Let the teacher begin on a batch before the student's forward, where the device can overlap the two."""
        if any(self._factors()):
            stage = self.stage
            stage.teacher.start(images, *stage.wanted(self._measuring))

    @property
    def _measuring(self) -> bool:
        return self._step % self.config.probe == 0 or not self.stage.measured

    def forward(self, preds: Any, batch: dict[str, Any]) -> Losses:
        """(loss vector times batch size, detached items by name), as Ultralytics' criteria return them."""
        task, items = self.base(preds, batch)
        factors, found = self._factors(), None
        if any(factors):
            found = self._distil(task, task.new_tensor(factors), preds, batch)
        else:
            self.probe.rest()
        if found is not None:
            losses, gains, weighted = found
            scaled = (gains * losses).sum(1)
            in_force = torch.where(weighted > 0, scaled / weighted, gains.sum(1)).detach()
            weighted = weighted.detach() / len(batch["img"])
        else:
            scaled = weighted = in_force = task.new_zeros(len(factors))
        self._step += 1
        for i, part in enumerate(self.config.method_configs):
            items |= {f"{part.name}_loss": weighted[i], f"{part.name}_gain": in_force[i]}
        return torch.cat([task.flatten(), scaled]), items

    def _distil(
        self, task: Tensor, factors: Tensor, preds: Any, batch: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """(M, L) unscaled losses times batch size, (M, L) gains, and (M,) losses as weighted by level.

        None where a loss is not finite: the step trains without.
        """
        stage, measuring = self.stage, self._measuring
        output = stage.teacher(batch["img"], *stage.wanted(measuring))
        levels, maps = stage.levels(preds, output, batch, self._seed + self._step, self.guard)
        each = [[loss * len(batch["img"]) for loss in method(levels)] for method in stage.methods]
        losses = torch.stack([torch.stack(own) for own in each])
        admitted = self.guard.losses_finite(losses, levels, batch.get("im_file", ()))
        if measuring:  # also what is not admitted: other processes, where it may be, wait for this one's norms
            pull = stage.measure(task, each, maps, output)
            self.guard.forget()
        gains = stage.gains(factors)
        if measuring and torch.isfinite(pull).all():
            self.probe.record([level.stride for level in levels], pull[0], pull[1:], gains, stage.share)
        if not admitted:
            return None
        return losses, gains, (losses * stage.level_weights()).sum(1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: the student's checkpoints and EMA are those of the student alone."""
        return kwargs.get("destination") or (args[0] if args else {})

    def private_state(self) -> dict[str, Tensor]:
        """What a resume needs of this module: adapters, confidence shares and gradient norms."""
        return super().state_dict()

    def load_private_state(self, state: dict[str, Tensor]) -> None:
        """Restore `private_state`, in place."""
        own = self.private_state()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise UserError("resume", "its adapters fit another teacher or student", "resume with the same teacher")
        with torch.no_grad():
            for key, value in own.items():
                value.copy_(state[key])
        for stage in self.stages:
            stage.look()  # type: ignore[operator]


def _ignore_missing_criterion_keys(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if "criterion." not in k]
