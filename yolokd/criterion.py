"""The seam: YOLO loss + sum of gain x method(levels), in the place of the student's own criterion."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yolokd.config import Distillation, Part
from yolokd.errors import UserError
from yolokd.methods import registered
from yolokd.methods.blocks import Adapter
from yolokd.probe import Probe
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

    share: Tensor

    def __init__(self, student: Detector, teacher: Teacher, config: Distillation, pairing: Pairing, seed: int) -> None:
        super().__init__()
        self._student = weakref.ref(student)
        self._base: Any = None
        self.teacher, self.pairing, self.config = teacher, pairing, config
        self.wants_logits = any(registered()[p.name].wants_logits for p in config.parts)
        self.wants_mean_logits = any(registered()[p.name].wants_mean_logits for p in config.parts)
        self.methods = build_methods(config.parts, pairing.levels, seed)
        self.probe = Probe()
        levels = len(pairing.levels)
        self.register_buffer("share", torch.full((levels,), 1 / levels))
        self._step = 0  # a plain number: reading a tensor's value would make a GPU wait
        self.register_load_state_dict_post_hook(_forgive_missing)  # type: ignore[no-untyped-call]

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

    def forward(self, preds: Any, batch: dict[str, Any]) -> Losses:
        """(loss vector times batch size, detached items by name), as Ultralytics' criteria return them."""
        task, items = self.base(preds, batch)
        measuring = self._measuring
        output = self.teacher(batch["img"], *self._wanted())
        levels = self._levels(preds, output)
        if measuring and output.logits:
            of_shared = self.pairing.classes.of_teacher
            shares = confidence_shares([of_shared(output.logits[s.stride]) for s in self.pairing.levels])
            self.share = shares.to(self.share)
        losses = self._losses(levels)
        scaled = [p.gain * losses[p.name] * len(batch["img"]) for p in self.config.parts]
        if measuring:
            self.probe.measure(task, dict(zip(losses, scaled, strict=True)), levels, self.share)
        self._step += 1
        for part in self.config.parts:
            items |= {
                f"{part.name}_loss": losses[part.name].sum().detach(),
                f"{part.name}_gain": self.share.new_tensor(part.gain),
            }
        return torch.cat([task.flatten(), *scaled]), items

    def start_teacher(self, images: Tensor) -> None:
        """Let the teacher begin on a batch before the student's forward, where the device can overlap the two."""
        self.teacher.start(images, *self._wanted())

    @property
    def _measuring(self) -> bool:
        return self._step % self.config.probe == 0

    def _wanted(self) -> tuple[bool, bool]:
        """Whether the teacher's class scores are needed in this step, and the mean of its branches'."""
        return self.wants_logits or (self._measuring and self.teacher.has_logits), self.wants_mean_logits

    def _losses(self, levels: Sequence[Level]) -> dict[str, Tensor]:
        """Each method's (L,) weighted losses, without gain."""
        return {
            part.name: method(levels) * self._level_weights()
            for part, method in zip(self.config.parts, self.methods, strict=True)
        }

    def _level_weights(self) -> Tensor:
        """(L,) weights of sum 1: a gain then means the same with either choice, and for pyramids of any height."""
        uniform = self.config.level_weights == "uniform" or not self.teacher.has_logits
        return torch.full_like(self.share, 1 / len(self.share)) if uniform else self.share

    def _levels(self, preds: Any, output: TeacherOutput) -> list[Level]:
        """Pair the student's maps (and logits) with the teacher's, on the student's grid."""
        raw = preds[1] if isinstance(preds, tuple) else preds
        raw = raw.get("one2many", raw)  # the maps of the one-to-one branch are detached
        strides, classes = self.pairing.student_strides, self.pairing.classes
        maps = dict(zip(strides, raw["feats"], strict=True))
        logits = dict(zip(strides, split_levels(raw["scores"], raw["feats"]), strict=True)) if self.wants_logits else {}
        paired = []
        for shape in self.pairing.levels:
            s, student = shape.stride, maps[shape.stride]
            level = Level(s, student, on_grid_of(student, output.maps[s].float()))  # cast once, for all methods
            if self.wants_logits:
                level.student_logits = classes.of_student(logits[s])
                level.teacher_logits = on_grid_of(student, classes.of_teacher(output.logits[s]))
            if self.wants_mean_logits:
                level.teacher_mean_logits = on_grid_of(student, classes.of_teacher(output.mean_logits[s]))
            paired.append(level)
        return paired

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Nothing: the student's checkpoints and EMA are those of the student alone."""
        return kwargs.get("destination") or (args[0] if args else {})

    def private_state(self) -> dict[str, Tensor]:
        """What a resume needs of this module: adapters, step count and confidence shares."""
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
