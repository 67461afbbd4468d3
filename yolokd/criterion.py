"""The seam: YOLO loss + sum of gain x method(levels), in the place of the student's own criterion."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from yolokd.balance import Balance
from yolokd.boxes import Labels, decoded, distances_on_grid_of
from yolokd.config import Distillation, Part
from yolokd.errors import UserError
from yolokd.methods import Method, registered
from yolokd.methods.blocks import Adapter
from yolokd.probe import Probe, gradient_norms
from yolokd.pyramid import ClassPairing, Detector, Level, LevelShape, confidence_shares, on_grid_of, split_levels
from yolokd.teacher import Teacher, TeacherOutput

Losses = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Pairing:
    """How a teacher and a student fit: the levels and classes that they share."""

    levels: tuple[LevelShape, ...]
    student_strides: tuple[int, ...]  # of all the student's maps, in the order of its head
    classes: ClassPairing


class DistillationCriterion(nn.Module):
    """Computes the student's YOLO loss and adds the distillation losses of every paired level.

    It is a submodule of the student, so that optimizer, DDP and device moves see its adapters; yet it adds nothing to
    the student's state_dict, and keeps student and teacher out of its own submodules.
    """

    def __init__(
        self, student: Detector, lessons: Sequence[tuple[Teacher, Pairing]], config: Distillation, seed: int
    ) -> None:
        super().__init__()
        self._student = weakref.ref(student)
        self._base: Any = None
        self.config, self._seed = config, seed
        self.stages = nn.ModuleList(Stage(*lesson, config, seed, k) for k, lesson in enumerate(lessons))
        strides = sorted({shape.stride for _, pairing in lessons for shape in pairing.levels})
        self.probe = Probe([part.name for part in config.parts], strides)
        self._step = 0  # a plain number: reading a tensor's value would make a GPU wait
        self.set_length(epochs=1, steps=1)
        self.register_load_state_dict_post_hook(_forgive_missing)  # type: ignore[no-untyped-call]

    def set_length(self, epochs: int, steps: int) -> None:
        """Say how many epochs the training has, and steps an epoch: schedules and stages are told in epochs."""
        self._epochs, self._steps = epochs, steps

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
        return [part.schedule.factor(self._epoch, self._epochs) for part in self.config.parts]

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
        factors = task.new_tensor(self._factors())
        parts = self.config.parts
        if any(self._factors()):
            losses, gains, weighted = self._distil(task, factors, preds, batch)
            scaled = (gains * losses).sum(1)
            in_force = torch.where(weighted > 0, scaled / weighted, gains.sum(1)).detach()
            weighted = weighted.detach() / len(batch["img"])
        else:
            scaled = weighted = in_force = torch.zeros_like(factors)
        self._step += 1
        for i, part in enumerate(parts):
            items |= {f"{part.name}_loss": weighted[i], f"{part.name}_gain": in_force[i]}
        return torch.cat([task.flatten(), scaled]), items

    def _distil(
        self, task: Tensor, factors: Tensor, preds: Any, batch: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(M, L) unscaled losses times batch size, (M, L) gains, and (M,) losses as weighted by level."""
        stage, measuring = self.stage, self._measuring
        output = stage.teacher(batch["img"], *stage.wanted(measuring))
        levels = stage.levels(preds, output, batch, self._seed + self._step)
        losses = torch.stack([method(levels) for method in stage.methods]) * len(batch["img"])
        if measuring:
            pull = stage.measure(task, losses, levels, output)
        gains = stage.gains(factors)
        if measuring:
            self.probe.record([level.stride for level in levels], pull[0], pull[1:], gains, stage.share)
        return losses, gains, (losses * stage.level_weights()).sum(1)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: the student's checkpoints and EMA are those of the student alone."""
        return kwargs.get("destination") or (args[0] if args else {})

    def private_state(self) -> dict[str, Tensor]:
        """What a resume needs of this module: adapters, step count, confidence shares and gradient norms."""
        return super().state_dict() | {"step": torch.tensor(self._step)}

    def load_private_state(self, state: dict[str, Tensor]) -> None:
        """Restore `private_state`, in place."""
        own = self.private_state()
        if own.keys() != state.keys() or any(own[k].shape != state[k].shape for k in own):
            raise UserError("resume", "its adapters fit another teacher or student", "resume with the same teacher")
        self._step = int(state["step"])
        with torch.no_grad():
            for key in own.keys() - {"step"}:
                own[key].copy_(state[key])
        for stage in self.stages:
            stage.measured = bool((stage.balance.seen > 0).any())  # type: ignore[union-attr,operator,assignment]


class Stage(nn.Module):
    """What one teacher gives: its pairing with the student, the methods built for it, and what is measured of them."""

    share: Tensor

    def __init__(self, teacher: Teacher, pairing: Pairing, config: Distillation, seed: int, number: int) -> None:
        super().__init__()
        self.teacher, self.pairing, self.config = teacher, pairing, config
        shapes = [replace(shape, stage=number) for shape in pairing.levels]
        self.methods = build_methods(config.parts, shapes, seed + number)
        every = [module for module in self.methods.modules() if isinstance(module, Method)]
        self.wants_logits = any(m.wants_logits or m.wants_boxes for m in every)
        self.wants_mean_logits = any(m.wants_mean_logits for m in every)
        self.wants_boxes = any(m.wants_boxes for m in every)
        self.measured = False
        self.register_buffer("share", torch.full((len(shapes),), 1 / len(shapes)))
        self.balance = Balance(len(config.parts), len(shapes))

    def wanted(self, measuring: bool) -> tuple[bool, bool, bool]:
        """Which of the teacher's predictions a step needs: class scores, the mean of its branches', boxes."""
        return self.wants_logits or (measuring and self.teacher.has_logits), self.wants_mean_logits, self.wants_boxes

    def measure(self, task: Tensor, losses: Tensor, levels: Sequence[Level], output: TeacherOutput) -> Tensor:
        """(1 + M, L) gradient norms at the neck, of the YOLO loss and of each method; takes them in."""
        if output.logits:
            of_shared = self.pairing.classes.of_teacher
            shares = confidence_shares([of_shared(output.logits[s.stride]) for s in self.pairing.levels])
            self.share.copy_(shares)
        maps = [level.student for level in levels]
        norms = torch.stack([gradient_norms(loss, maps) for loss in (task, *losses)])
        self.balance.update(norms[0], norms[1:])
        self.measured = True
        return norms

    def gains(self, factors: Tensor) -> Tensor:
        """(M, L) gains in force, level weights and the schedules' factors, (M,), included; no gradient."""
        weights = self.level_weights()
        fixed = weights.new_tensor([p.gain for p in self.config.parts])[:, None] * weights
        if self.config.balance == "off":
            return fixed * factors[:, None]
        share = self.config.balance * weights * len(weights)
        return self.balance.gains(share, fixed) * factors[:, None]

    def level_weights(self) -> Tensor:
        """(L,) weights of sum 1: a gain then means the same with either choice, and for pyramids of any height."""
        uniform = self.config.level_weights == "uniform" or not self.teacher.has_logits
        return torch.full_like(self.share, 1 / len(self.share)) if uniform else self.share

    def levels(self, preds: Any, output: TeacherOutput, batch: dict[str, Any], seed: int) -> list[Level]:
        """Pair the student's maps (and predictions) with the teacher's, on the student's grid."""
        raw = preds[1] if isinstance(preds, tuple) else preds
        raw = raw.get("one2many", raw)  # the maps of the one-to-one branch are detached
        strides, classes = self.pairing.student_strides, self.pairing.classes
        maps = dict(zip(strides, raw["feats"], strict=True))
        logits = dict(zip(strides, split_levels(raw["scores"], raw["feats"]), strict=True)) if self.wants_logits else {}
        boxes = dict(zip(strides, split_levels(raw["boxes"], raw["feats"]), strict=True)) if self.wants_boxes else {}
        labels = Labels.of_centers(batch["batch_idx"], batch["bboxes"]).to(batch["img"].device)
        paired = []
        for shape in self.pairing.levels:
            s, student = shape.stride, maps[shape.stride]
            level = Level(s, student, on_grid_of(student, output.maps[s].float()))  # cast once, for all methods
            level.labels, level.seed = labels, seed
            if self.wants_logits:
                level.student_logits = classes.of_student(logits[s])
                level.teacher_logits = on_grid_of(student, classes.of_teacher(output.logits[s]))
            if self.wants_mean_logits:
                level.teacher_mean_logits = on_grid_of(student, classes.of_teacher(output.mean_logits[s]))
            if self.wants_boxes:
                level.student_boxes = decoded(boxes[s], boxes[s].shape[1] // 4)
                level.teacher_boxes = distances_on_grid_of(student, output.boxes[s])
            paired.append(level)
        return paired


class PerLevel(nn.ModuleList):
    """One method at every level: L levels in, (L,) losses out."""

    def forward(self, levels: Sequence[Level]) -> Tensor:
        """Each level's loss, unscaled."""
        return torch.stack([method(level) for method, level in zip(self, levels, strict=True)])


def build_methods(parts: Sequence[Part], levels: Sequence[LevelShape], seed: int) -> nn.ModuleList:
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


def _forgive_missing(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [k for k in keys.missing_keys if "criterion." not in k]
