"""One teacher's part of a training: paired levels, the methods built for them, and the gains in force."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from yolokd.config.schema import DistillationConfig
from yolokd.distillation.balance import Balance
from yolokd.distillation.gradients import gradient_norms, per_level_gradient_norms
from yolokd.distillation.nonfinite import NonFiniteGuard
from yolokd.distillation.observer import Observed
from yolokd.distillation.per_level import build_methods, needs_labels
from yolokd.distillation.predictions import Predictions
from yolokd.methods import Method
from yolokd.models.teachers.outputs import RequestedOutputs, TeacherOutput
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.boxes import Labels, decode_distances, resize_distances, split_bins
from yolokd.pyramid.level import Level, confidence_shares, floored, resize_to, split_levels
from yolokd.pyramid.pairing import ClassSelection, Pairing
from yolokd.runtime.distributed import all_reduce_mean


class Stage(nn.Module):
    """One teacher's part of a training: its pairing with the student, its methods, and what was measured of them.

    number: counts the stages from 0, the weakest teacher's; those of an ensemble all last the whole training. The names
    of attributes and buffers that hold tensors (`methods`, `share`, `balance`) are names in sidecars: to change one,
    raise sidecar.FORMAT.
    """

    share: Tensor  # (L,) each level's share of the teacher's confidence, a running mean
    fixed_gains: Tensor  # (M, 1) those of the configuration

    def __init__(self, teacher: Teacher, pairing: Pairing, config: DistillationConfig, seed: int, number: int) -> None:
        super().__init__()
        self.teacher, self.pairing, self.config = teacher, pairing, config
        in_turn = number if config.teachers == "stages" else 0
        shapes = [replace(shape, stage=in_turn) for shape in pairing.levels]
        self.methods = build_methods(config.method_configs, shapes, seed + number, config.adapter)
        if teacher.settings.channels_last:  # maps in two memory formats would be slow to compare
            self.methods.to(memory_format=torch.channels_last)
        methods = [module for module in self.methods.modules() if isinstance(module, Method)]
        self._needs_labels = [needs_labels(method) for method in self.methods]
        self.wants_logits = any(method.wants_logits or method.wants_boxes for method in methods)
        self.wants_mean_logits = any(method.wants_mean_logits for method in methods)
        self.wants_boxes = any(method.wants_boxes for method in methods)
        self.wants_box_logits = any(method.wants_box_logits for method in methods)
        self.wants_assigned = any(method.wants_assigned for method in methods)
        self.wants_teacher_head = any(method.wants_teacher_head for method in methods)
        self.head_depths = {method.head_depth for method in methods if method.head_depth}
        self.select_teacher = ClassSelection(pairing.classes.teacher)
        self.select_student = ClassSelection(pairing.classes.student)
        self.measured = False  # whether the gradient of each method has been measured: until then every step does
        self.register_buffer("share", torch.full((len(shapes),), 1 / len(shapes)))
        gains = torch.tensor([[float(method.gain)] for method in config.method_configs])
        self.register_buffer("fixed_gains", gains, persistent=False)
        self.balance = Balance(len(config.method_configs), len(shapes))

    def requested_outputs(self, measuring: bool) -> RequestedOutputs:
        """Return which predictions of the teacher a step needs; one that measures needs its class scores."""
        logits = self.wants_logits or (measuring and self.teacher.has_logits)
        return RequestedOutputs(logits, self.wants_mean_logits, self.wants_boxes, self.wants_box_logits)

    def losses(self, levels: Sequence[Level], labelled: int) -> list[list[Tensor]]:
        """Return the loss of each method at each level.

        labelled: how many images of the batch have labels, the first ones; some methods see these alone.

        Beside a teacher that runs in bfloat16 on a CPU, the convolutions of the methods multiply in bfloat16, too;
        their weights and all other arithmetic stay in float32. That changes the gradient at the student's maps by less
        than 1 %, or by 2 to 5 % (relative L2) for methods with a ReLU: rounding moves values near 0 to its other side.
        """
        needed = any(self._needs_labels) and labelled < len(levels[0].student)
        with_labels = [level.first(labelled) for level in levels] if needed else levels
        with _methods_autocast(self.teacher, levels[0].student.device.type):
            return [
                method(with_labels if needs else levels)
                for method, needs in zip(self.methods, self._needs_labels, strict=True)
            ]

    def measure(
        self,
        task: Tensor,
        losses: Sequence[Sequence[Tensor]],
        maps: Sequence[Tensor],
        levels: Sequence[Level],
        output: TeacherOutput,
    ) -> Tensor:
        """Measure gradients at the neck, update balance and confidence shares, and return the norms (1 + M, L).

        The first row is of the YOLO loss, the others of each method's loss at each level. task: the YOLO loss.
        losses: M times L separate tensors; slices of one stack would drag the others into each backward pass. maps:
        the student's L neck maps.

        A norm is 0, so that it is not used, where a method learns at assigned positions and the batch has none: what is
        left of its loss there may be weaker by a factor of 1e7, which the balance would make up for in the next steps.
        With several processes, all must call this together, and all get the same norms: those of the whole batch
        up to a normalization that cancels in their ratios.
        """
        rows = [gradient_norms(task, maps)]
        for method, level_losses in zip(self.methods, losses, strict=True):
            rows.append(per_level_gradient_norms(level_losses, maps) * _can_learn(method, levels))
        norms = all_reduce_mean(torch.stack(rows).square()).sqrt()
        self.balance.update(norms[0], norms[1:])
        self.update_measured()
        if output.logits:
            self._update_share(output)
        return norms

    def _update_share(self, output: TeacherOutput) -> None:
        """Add the shares of a batch to their running means, which cover as many measurements as those of the norms."""
        logits = [self.select_teacher(output.logits[level.stride]) for level in self.pairing.levels]
        new = all_reduce_mean(confidence_shares(logits))
        mean = torch.lerp(self.share, new, self.balance.newest_weight)
        self.share.copy_(torch.where(torch.isfinite(new).all(), mean, self.share))

    def update_measured(self) -> None:
        """Note whether each method has been measured at some level."""
        self.measured = bool((self.balance.seen > 0).any(1).all())

    def gains(self, factors: Sequence[float]) -> Tensor:
        """Return (M, L) gains in force, with level weights and the schedules' M factors; no gradient."""
        weights = self.level_weights()
        gains = self.fixed_gains * weights
        if self.config.balance != "off":
            gains = self.balance.gains(self.config.balance * weights * len(weights), gains)
        # One by one: a tensor of the factors would be a copy to the device in each step, for which the host waits.
        return torch.stack([row * factor for row, factor in zip(gains, factors, strict=True)])

    def level_weights(self) -> Tensor:
        """Return (L,) weights of sum 1, so that a gain means the same for either choice and any number of levels."""
        uniform = self.config.level_weights == "uniform" or not self.teacher.has_logits
        return floored(self.share, 1.0 if uniform else self.config.level_floor, len(self.share))

    def predictions(self, preds: Any, output: TeacherOutput) -> Predictions:
        """Return the teacher's predictions that methods want, on the student's grid and of the shared classes.

        preds: what the student's head returns in training.
        """
        maps = self._by_stride(raw_outputs(preds)["feats"])
        boxes, box_logits = output.boxes, output.box_logits  # a plan refuses box_logits of teachers on other grids
        return Predictions(
            self._selected(output.logits, maps) if self.wants_logits else {},
            self._selected(output.mean_logits, maps) if self.wants_mean_logits else {},
            {s: resize_distances(maps[s], boxes[s]) for s in self._strides} if self.wants_boxes else {},
            {s: split_bins(box_logits[s]) for s in self._strides} if self.wants_box_logits else {},
        )

    def _selected(self, logits: dict[int, Tensor], maps: dict[int, Tensor]) -> dict[int, Tensor]:
        return {s: resize_to(maps[s], self.select_teacher(logits[s])) for s in self._strides}

    @property
    def _strides(self) -> list[int]:
        return [shape.stride for shape in self.pairing.levels]

    def _by_stride(self, values: Sequence[Tensor]) -> dict[int, Tensor]:
        return dict(zip(self.pairing.student_strides, values, strict=True))

    def levels(
        self,
        preds: Any,
        teacher_maps: dict[int, Tensor],
        predictions: Predictions,
        batch: dict[str, Any],
        seed: int,
        guard: NonFiniteGuard,
        observed: Observed,
    ) -> tuple[list[Level], list[Tensor]]:
        """Pair the student's maps and predictions with the teacher's, on the student's grid.

        preds: what the student's head returns in training. predictions: those that the student learns from. seed: of
        what methods draw in this step. observed: what methods want of the step beside these. Returns the levels, whose
        maps `guard` protects, and the student's maps themselves.
        """
        raw = raw_outputs(preds)

        def split(flat: Tensor) -> dict[int, Tensor]:
            return self._by_stride(split_levels(flat, raw["feats"]))

        maps = self._by_stride(raw["feats"])
        logits = split(raw["scores"]) if self.wants_logits else {}
        boxes = split(raw["boxes"]) if self.wants_boxes or self.wants_box_logits else {}
        assigned = split(observed.assigned[:, None]) if observed.assigned is not None else {}
        size = batch["img"].shape[-2:]
        labels = batch.get("labels") or Labels.from_centers(batch["batch_idx"].cpu(), batch["bboxes"].cpu(), *size)
        levels = []
        for stride in self._strides:
            student = guard.guard_gradient(maps[stride], stride)
            level = Level(stride, student, resize_to(student, _readable(teacher_maps[stride])))
            level.labels, level.seed = labels, seed
            if self.wants_logits:
                level.student_logits = self.select_student(guard.guard_gradient(logits[stride], stride))
            level.teacher_logits = predictions.logits.get(stride)
            level.teacher_mean_logits = predictions.mean_logits.get(stride)
            level.teacher_boxes = predictions.boxes.get(stride)
            level.teacher_box_logits = predictions.box_logits.get(stride)
            if boxes:
                self._add_student_boxes(level, guard.guard_gradient(boxes[stride], stride))
            if assigned:
                level.assigned = assigned[stride][:, 0]
            for depth in self.head_depths:
                box, classes = observed.box_maps[stride, depth], observed.class_maps[stride, depth]
                level.head_maps[depth] = guard.guard_gradient(box, stride), guard.guard_gradient(classes, stride)
            if self.wants_teacher_head:
                level.teacher_head = replace(self.teacher.heads[stride], select=self.select_teacher)
            levels.append(level)
        return levels, [maps[stride] for stride in self._strides]

    def _add_student_boxes(self, level: Level, raw: Tensor) -> None:
        """Add the student's boxes to a level. raw: (B, 4·bins, H, W), the box output of its head."""
        if self.wants_boxes:
            level.student_boxes = decode_distances(raw, raw.shape[1] // 4)
        if self.wants_box_logits:
            level.student_box_logits = split_bins(raw)


def _can_learn(method: Any, levels: Sequence[Level]) -> Tensor:
    """Return (L,) bool: False at levels where a method wants assigned positions, and the batch has none."""
    assigned = [level.assigned if module.wants_assigned else None for module, level in zip(method, levels, strict=True)]
    always = torch.ones((), dtype=torch.bool, device=levels[0].student.device)
    return torch.stack([always if positions is None else positions.any() for positions in assigned])


def raw_outputs(preds: Any) -> dict[str, Any]:
    """Return the maps and raw predictions that are distilled of what a student's head returns in training."""
    raw: dict[str, Any] = preds[1] if isinstance(preds, tuple) else preds
    many: dict[str, Any] = raw.get("one2many", raw)  # the maps of the one-to-one branch are detached
    return many


def _readable(maps: Tensor) -> Tensor:
    """Return a teacher's maps as methods read them: CPUs would convert them to float32 anew in each operation."""
    return maps.float() if maps.device.type == "cpu" else maps


def _methods_autocast(teacher: Teacher, device: str) -> AbstractContextManager[object]:
    """Return the autocast to bfloat16 beside a teacher that runs so on a CPU, unless the training has its own."""
    if device != "cpu" or teacher.settings.dtype != torch.bfloat16 or torch.is_autocast_enabled("cpu"):
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16)
