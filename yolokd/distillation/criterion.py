"""The criterion of a student with a teacher: the YOLO loss plus the sum of gain x method(levels)."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.utils import RANK

from yolokd.config.schema import DistillationConfig
from yolokd.data.mixed import labelled_count
from yolokd.distillation.gradients import GradientRecorder
from yolokd.distillation.nonfinite import NonFiniteGuard
from yolokd.distillation.observer import StepObserver
from yolokd.distillation.predictions import average_predictions
from yolokd.distillation.stage import Stage
from yolokd.errors import UserError
from yolokd.models.detector import Detector, dense_heads, head_of
from yolokd.models.teachers.outputs import TeacherOutput
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.level import Level
from yolokd.pyramid.pairing import Pairing

Losses = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Taught:
    """Holds what one teacher gives the student to learn from a batch.

    maps: the student's at the levels. losses: of each method at each level, times the batch size; lists, because
    measuring one of a stacked tensor would run the backward pass of all.
    """

    stage: Stage
    output: TeacherOutput
    levels: list[Level]
    maps: list[Tensor]
    losses: list[list[Tensor]]


@dataclass(frozen=True)
class DistillationLosses:
    """The distillation losses of a batch, M methods at L levels.

    losses: (M, L) before gains, multiplied by the batch size as the YOLO loss is; carry gradient. gains: (M, L) in
    force, without gradient. weighted: (M,) these losses, summed over levels by the levels' weights. Of an ensemble, L
    counts the levels of all teachers, and gains and weights are divided by the number of teachers: the student learns
    from the mean loss.
    """

    losses: Tensor
    gains: Tensor
    weighted: Tensor


class DistillationCriterion(nn.Module):
    """Computes the student's YOLO loss, and adds the distillation losses of every paired level.

    Ultralytics calls `student.criterion(preds, batch)`; this module takes that place. It is a submodule of the student,
    so that optimizer, DDP and device moves see its adapters. But it adds nothing to the student's state_dict, and it
    holds student and teacher outside of its own submodules.

    A step: `begin_step` starts the teachers and hooks the head; the student's forward pass; `forward` computes the
    losses, and measures gradients in one step of `probe`; in the backward pass, hooks set to 0 what is not finite.

    student: a detector in training mode. teachers: each with its pairing, in their order. seed: of adapters and masks.
    """

    def __init__(
        self, student: Detector, teachers: Sequence[tuple[Teacher, Pairing]], config: DistillationConfig, seed: int
    ) -> None:
        super().__init__()
        self._student = weakref.ref(student)
        self._base: Any = None
        self.config, self._seed = config, seed
        stages = (Stage(*pair, config, seed, number) for number, pair in enumerate(teachers))
        self.stages = nn.ModuleList(stages)
        self.observer = StepObserver(self.stage_of(0).wants_assigned, self.stage_of(0).head_depths)
        strides = sorted({shape.stride for _, pairing in teachers for shape in pairing.levels})
        self.recorder = GradientRecorder([method.name for method in config.method_configs], strides)
        self.guard = NonFiniteGuard([method.name for method in config.method_configs])
        for parameter in self.parameters():
            self.guard.guard_adapter(parameter)
        self.begin_epoch(0, epochs=1, steps=1)
        self.taught: list[Stage] = self.active  # the stages of the last step
        self.register_load_state_dict_post_hook(_ignore_missing_criterion_keys)  # type: ignore[no-untyped-call]

    def begin_epoch(self, epoch: int, epochs: int, steps: int) -> None:
        """Set the clock of schedules and stages: `epoch`, from 0, of `epochs`, each of `steps` steps.

        The trainer calls this at every epoch, because Ultralytics may change both numbers during a training (`time=`,
        a batch that did not fit into memory). It gives the main process's `epochs`: with `time=`, each process has an
        estimate of its own.
        """
        self._epochs, self._steps = epochs, steps
        self._step = epoch * steps  # a plain number: reading a tensor's value would make a GPU wait

    @property
    def base(self) -> Any:
        """Return Ultralytics' criterion; it is built on first use, because class weights reach the student late."""
        if self._base is None:
            student = self._student()
            assert student is not None
            # TensorBoard's trace reads every property in inference mode, whose tensors no training can use later.
            with torch.inference_mode(False):
                self._adopt(student.init_criterion())
        return self._base

    @base.setter
    def base(self, criterion: Any) -> None:
        self._adopt(criterion)

    def _adopt(self, criterion: Any) -> None:
        vars(self)["_base"] = criterion  # an RT-DETR's is a module, and would otherwise become a submodule
        self.observer.watch_assigner(criterion)

    def update(self) -> None:
        """Tell Ultralytics' criterion that an epoch ended: end-to-end losses then change the mix of their branches."""
        if hasattr(self.base, "update"):
            self.base.update()

    @property
    def active(self) -> list[Stage]:
        """Return the stages of the teachers that teach at the present step: all of an ensemble, otherwise one."""
        if self.config.teachers == "ensemble":
            return [self.stage_of(number) for number in range(len(self.stages))]
        return [self.stage_of(self.config.stage_number(self._epoch, self._epochs))]

    @property
    def stage(self) -> Stage:
        """Return the stage of the present step; of an ensemble, the first teacher's."""
        return self.active[0]

    def stage_of(self, number: int) -> Stage:
        """Return the stage of a teacher, counted from 0."""
        stage: Stage = self.stages[number]  # type: ignore[assignment]
        return stage

    @property
    def _epoch(self) -> float:
        return self._step / self._steps

    def begin_step(self, images: Tensor) -> None:
        """Start the teachers on (B, C, H, W) images before the student's forward, so that a GPU can overlap the two.

        Also note what methods want of that forward.
        """
        if any(self.config.factors(self._epoch, self._epochs)):
            student, measuring = self._student(), self._measuring
            assert student is not None
            head = head_of(student)
            self.observer.watch_head(head, dense_heads(head, self.stage.pairing.student_strides))
            for stage in self.active:
                stage.teacher.start(images, stage.requested_outputs(measuring))

    def discard_step(self) -> None:
        """Free what a step that failed has left behind, since Ultralytics tries again with a smaller batch."""
        for stage in self.active:
            stage.teacher.discard_pending()
        self.observer.discard()
        self.guard.discard()

    @property
    def _draw_seed(self) -> int:
        """Return the seed of what methods draw in this step: each process masks other positions of its images."""
        return self._seed + self._step + max(int(RANK), 0) * 2**32

    @property
    def _measuring(self) -> bool:
        return self._step % self.config.probe == 0 or not all(stage.measured for stage in self.active)

    def forward(self, preds: Any, batch: dict[str, Any]) -> Losses:
        """Return (loss vector times batch size, detached items by name), as Ultralytics' criteria do.

        Of a batch with unlabelled images, the YOLO loss sees the labelled ones alone, and the batch size is their
        number. The distillation losses are means over all images.
        """
        labelled = labelled_count(batch)
        task, items = self._task_loss(preds, batch, labelled)
        scaled, own_items = self.distil(task, preds, batch, labelled)
        return torch.cat([task.flatten(), scaled]), items | own_items

    def distil(self, task: Tensor, preds: Any, batch: dict[str, Any], scale: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the methods' losses with their gains, (M,), and detached items by name; end the step.

        task: the student's own loss. preds: what its head returns in training; None if it does not predict at every
        position. scale: what the means over the batch are multiplied by, as `task` is.
        """
        factors = self.config.factors(self._epoch, self._epochs)
        if any(factors):
            distilled = self._compute_losses(task, factors, preds, batch, scale)
            scaled = (distilled.gains * distilled.losses).sum(1)
            weighted = distilled.weighted
            in_force = torch.where(weighted > 0, scaled / weighted, distilled.gains.sum(1)).detach()
            weighted = weighted.detach() / scale
        else:
            self.recorder.record_idle()
            scaled = weighted = in_force = task.new_zeros(len(factors))
        self.taught = self.active
        self._step += 1
        items: dict[str, Tensor] = {}
        for i, method in enumerate(self.config.method_configs):
            items |= {f"{method.name}_loss": weighted[i], f"{method.name}_gain": in_force[i]}
        return scaled, items

    def _task_loss(self, preds: Any, batch: dict[str, Any], labelled: int) -> Losses:
        """Return the YOLO loss of the batch's first `labelled` images."""
        if labelled == len(batch["img"]):
            return self.base(preds, batch)  # type: ignore[no-any-return]
        student = self._student()
        assert student is not None
        of_images = ("masks", "sem_masks") if student.args.overlap_mask else ("sem_masks",)  # others are of objects
        first = {key: batch[key][:labelled] for key in of_images if key in batch}
        # Unlabelled images have no boxes in the batch, and so would teach the head that all of them is background.
        return self.base(_first_images(preds, labelled), batch | first)  # type: ignore[no-any-return]

    def _compute_losses(
        self, task: Tensor, factors: Sequence[float], preds: Any, batch: dict[str, Any], scale: int
    ) -> DistillationLosses:
        """Return the losses of all methods; all 0 if one of them is not finite: the step trains without them."""
        measuring, taught = self._measuring, self._teach(preds, batch, scale)
        stages = [each.stage for each in taught]
        if measuring:  # even if not finite: other processes, where the losses may be finite, wait for these norms
            measured = [each.stage.measure(task, each.losses, each.maps, each.levels, each.output) for each in taught]
            self.guard.discard()
        gains = torch.cat([stage.gains(factors) for stage in stages], 1) / len(stages)
        if measuring:
            self._record(stages, torch.cat(measured, 1), gains)
        losses = torch.cat([torch.stack([*map(torch.stack, each.losses)]) for each in taught], 1)
        all_levels = [level for each in taught for level in each.levels]
        losses = self.guard.guard_losses(losses, task, all_levels, batch.get("im_file", ()))
        weights = torch.cat([stage.level_weights() for stage in stages]) / len(stages)
        return DistillationLosses(losses, gains, (losses * weights).sum(1))

    def _teach(self, preds: Any, batch: dict[str, Any], scale: int) -> list[Taught]:
        """Return what each teacher that teaches now gives the student to learn."""
        stages, measuring = self.active, self._measuring
        outputs = [stage.teacher(batch["img"], stage.requested_outputs(measuring)) for stage in stages]
        observed = self.observer.take(len(batch["img"]))
        preds = {"feats": observed.neck_maps} if preds is None else preds
        predictions = average_predictions(
            [stage.predictions(preds, output) for stage, output in zip(stages, outputs, strict=True)],
            [stage.select_student.index for stage in stages],
            1 + max((index for stage in stages for index in stage.pairing.classes.student), default=0),
        )
        labelled, taught = labelled_count(batch), []
        for stage, output, predicted in zip(stages, outputs, predictions, strict=True):
            levels, maps = stage.levels(preds, output.maps, predicted, batch, self._draw_seed, self.guard, observed)
            losses = [[loss * scale for loss in of_method] for of_method in stage.losses(levels, labelled)]
            taught.append(Taught(stage, output, levels, maps, losses))
        return taught

    def _record(self, stages: Sequence[Stage], norms: Tensor, gains: Tensor) -> None:
        """Record norms, (1 + M, L), and gains, (M, L), if the norms are finite. L: the levels of all the stages."""
        if torch.isfinite(norms).all():
            strides = [shape.stride for stage in stages for shape in stage.pairing.levels]
            share = torch.cat([stage.share for stage in stages]) / len(stages)
            self.recorder.record(strides, norms[0], norms[1:], gains, share)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return nothing of this module, so that checkpoints and EMA hold the student alone."""
        return kwargs.get("destination") or (args[0] if args else {})

    def private_state(self) -> dict[str, Tensor]:
        """Return what a resume needs of this module: adapters, confidence shares and gradient norms."""
        return super().state_dict()

    def load_private_state(self, state: dict[str, Tensor]) -> None:
        """Restore a `private_state` in place.

        Raises UserError if its names or shapes are not those of this module.
        """
        tensors = self.private_state()
        if tensors.keys() != state.keys() or any(tensors[k].shape != state[k].shape for k in tensors):
            raise UserError(
                "resume", "its adapters fit another teacher or student", "resume with the same teacher and student"
            )
        with torch.no_grad():
            for key, value in tensors.items():
                value.copy_(state[key])
        for stage in self.stages:
            stage.update_measured()  # type: ignore[operator]


def _first_images(preds: Any, count: int) -> Any:
    """Return a head's predictions, tensors in dicts, lists and tuples, for the first `count` images of the batch."""
    if isinstance(preds, dict):
        return {key: _first_images(value, count) for key, value in preds.items()}
    if isinstance(preds, list | tuple):
        return type(preds)(_first_images(value, count) for value in preds)
    return preds[:count]


def _ignore_missing_criterion_keys(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if "criterion." not in k]
