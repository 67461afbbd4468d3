"""What one teacher gives a student: their pairing, the methods built for it, and the gains that are in force."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from yolokd.config.schema import DistillationConfig, MethodConfig
from yolokd.distillation.balance import Balance
from yolokd.distillation.gradients import gradient_norms, per_level_gradient_norms
from yolokd.distillation.nonfinite import NonFiniteGuard
from yolokd.methods import Method, registered
from yolokd.methods.blocks import Adapter
from yolokd.models.teacher import Teacher, TeacherOutput
from yolokd.pyramid.boxes import Labels, decoded, resize_distances
from yolokd.pyramid.level import Level, LevelShape, confidence_shares, resize_to, split_levels
from yolokd.pyramid.pairing import Pairing
from yolokd.runtime.distributed import all_reduce_mean


class Stage(nn.Module):
    """What one teacher gives: its pairing with the student, the methods built for it, and what is measured of them."""

    share: Tensor

    def __init__(self, teacher: Teacher, pairing: Pairing, config: DistillationConfig, seed: int, number: int) -> None:
        super().__init__()
        self.teacher, self.pairing, self.config = teacher, pairing, config
        shapes = [replace(shape, stage=number) for shape in pairing.levels]
        self.methods = build_methods(config.method_configs, shapes, seed + number)
        every = [module for module in self.methods.modules() if isinstance(module, Method)]
        self.wants_logits = any(m.wants_logits or m.wants_boxes for m in every)
        self.wants_mean_logits = any(m.wants_mean_logits for m in every)
        self.wants_boxes = any(m.wants_boxes for m in every)
        self.measured = False
        self.register_buffer("share", torch.full((len(shapes),), 1 / len(shapes)))
        self.balance = Balance(len(config.method_configs), len(shapes))

    def wanted(self, measuring: bool) -> tuple[bool, bool, bool]:
        """Which of the teacher's predictions a step needs: class scores, the mean of its branches', boxes."""
        return self.wants_logits or (measuring and self.teacher.has_logits), self.wants_mean_logits, self.wants_boxes

    def measure(
        self, task: Tensor, losses: Sequence[Sequence[Tensor]], maps: Sequence[Tensor], output: TeacherOutput
    ) -> Tensor:
        """(1 + M, L) gradient norms at the neck, of the YOLO loss and of each method's at each level; takes them in.

        losses: M times L, not taken from one stack, which would drag the others into each backward pass.

        Of several processes all must call it, and get the same: the norms of the whole batch, but for its
        normalization, which their ratios do not see.
        """
        if output.logits:
            of_shared = self.pairing.classes.of_teacher
            shares = all_reduce_mean(
                confidence_shares([of_shared(output.logits[s.stride]) for s in self.pairing.levels])
            )
            self.share.copy_(torch.where(torch.isfinite(shares).all(), shares, self.share))
        found = [gradient_norms(task, maps), *(per_level_gradient_norms(own, maps) for own in losses)]
        norms = all_reduce_mean(torch.stack(found).square()).sqrt()
        self.balance.update(norms[0], norms[1:])
        self.look()
        return norms

    def look(self) -> None:
        """Note whether each method has been measured: until then every step does."""
        self.measured = bool((self.balance.seen > 0).any(1).all())

    def gains(self, factors: Tensor) -> Tensor:
        """(M, L) gains in force, level weights and the schedules' factors, (M,), included; no gradient."""
        weights = self.level_weights()
        fixed = weights.new_tensor([p.gain for p in self.config.method_configs])[:, None] * weights
        if self.config.balance == "off":
            return fixed * factors[:, None]
        share = self.config.balance * weights * len(weights)
        return self.balance.gains(share, fixed) * factors[:, None]

    def level_weights(self) -> Tensor:
        """(L,) weights of sum 1: a gain then means the same with either choice, and for pyramids of any height."""
        uniform = self.config.level_weights == "uniform" or not self.teacher.has_logits
        return torch.full_like(self.share, 1 / len(self.share)) if uniform else self.share

    def levels(
        self, preds: Any, output: TeacherOutput, batch: dict[str, Any], seed: int, guard: NonFiniteGuard
    ) -> tuple[list[Level], list[Tensor]]:
        """Pair the student's maps (and predictions) with the teacher's, on the student's grid; and those maps bare."""
        raw = preds[1] if isinstance(preds, tuple) else preds
        raw = raw.get("one2many", raw)  # the maps of the one-to-one branch are detached
        strides, classes = self.pairing.student_strides, self.pairing.classes
        maps = dict(zip(strides, raw["feats"], strict=True))
        logits = dict(zip(strides, split_levels(raw["scores"], raw["feats"]), strict=True)) if self.wants_logits else {}
        boxes = dict(zip(strides, split_levels(raw["boxes"], raw["feats"]), strict=True)) if self.wants_boxes else {}
        labels = Labels.from_centers(batch["batch_idx"], batch["bboxes"]).to(batch["img"].device)
        paired = []
        for shape in self.pairing.levels:
            s = shape.stride
            student = guard.guard_gradient(maps[s], s)
            level = Level(s, student, resize_to(student, output.maps[s].float()))  # cast once, for all methods
            level.labels, level.seed = labels, seed
            if self.wants_logits:
                level.student_logits = classes.of_student(guard.guard_gradient(logits[s], s))
                level.teacher_logits = resize_to(student, classes.of_teacher(output.logits[s]))
            if self.wants_mean_logits:
                level.teacher_mean_logits = resize_to(student, classes.of_teacher(output.mean_logits[s]))
            if self.wants_boxes:
                level.student_boxes = decoded(boxes[s], boxes[s].shape[1] // 4)
                level.teacher_boxes = resize_distances(student, output.boxes[s])
            paired.append(level)
        return paired, [maps[shape.stride] for shape in self.pairing.levels]


class PerLevel(nn.ModuleList):
    """One method at every level: L levels in, L scalar losses out."""

    def forward(self, levels: Sequence[Level]) -> list[Tensor]:
        """Each level's loss, unscaled."""
        return [method(level) for method, level in zip(self, levels, strict=True)]


def build_methods(parts: Sequence[MethodConfig], levels: Sequence[LevelShape], seed: int) -> nn.ModuleList:
    """A PerLevel for each part, initialized from a random stream of their own.

    The student's initial weights and augmentations are then the same whatever the method.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        built = [PerLevel(registered()[p.name](shape, **p.constants) for shape in levels) for p in parts]
    for at_one_level in zip(*built, strict=True):
        _share_adapters(at_one_level)
    return nn.ModuleList(built)


def _share_adapters(methods: Sequence[nn.Module]) -> None:
    """Composed methods of one level train one adapter where their first ones are equal: its map is computed once."""
    shared: dict[torch.Size, Adapter] = {}
    for method in methods:
        name, own = next(((n, c) for n, c in method.named_children() if isinstance(c, Adapter)), ("", None))
        if own is not None:
            setattr(method, name, shared.setdefault(own.weight.shape, own))
