"""What works between two families of detectors: each kind of method, tried in training steps, or why it is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from helpers.data import two_images
from yolokd import UserError
from yolokd.distillation.query_criterion import make_criterion
from yolokd.training.plan import TrainPlan, make_plan

# {what is compared: the method that stands for it}
METHOD_KINDS = {
    "maps": "fitnet",
    "maps by class scores": "pdf",
    "class scores and boxes": "bckd",
    "box distributions": "ld",
    "the teacher's head": "crosskd",
}
STEPS = 2
MAYBE_IDLE = {"ld"}  # teaches where the YOLO loss assigned an object, which may be at unpaired levels


def try_pair(teacher: Path, student: Path, data: str) -> dict[str, str]:
    """Train a pair for STEPS steps with every kind of method that is not refused; return the others, and why they are.

    teacher: a checkpoint. student: a .yaml. Raises AssertionError if a loss is not finite, or teaches nothing.
    """
    common = {"teacher": str(teacher), "model": str(student), "data": data, "imgsz": 64, "device": "cpu"}
    refused: dict[str, str] = {}
    try:
        plan = make_plan(common | {"method": "+".join(METHOD_KINDS.values())})
    except UserError:
        refused = {kind: problem for kind, method in METHOD_KINDS.items() if (problem := _problem(common, method))}
        accepted = [method for kind, method in METHOD_KINDS.items() if kind not in refused]
        if not accepted:
            return refused
        plan = make_plan(common | {"method": "+".join(accepted)})
    _train(plan)
    return refused


def _problem(common: Mapping[str, object], method: str) -> str | None:
    """Return why a method is refused, or None if it is not."""
    try:
        make_plan({**common, "method": method})
    except UserError as error:
        return error.problem
    return None


def _train(plan: TrainPlan) -> None:
    """Take a few steps on one batch."""
    student = plan.student.train()
    student.args, student.nc = plan.args, plan.data["nc"]  # as a trainer sets them
    criterion = make_criterion(student, [(p.teacher, p.pairing) for p in plan.teachers], plan.config, seed=0)
    criterion.begin_epoch(0, epochs=1, steps=10 * STEPS)
    student.criterion = criterion
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    adapters = dict(criterion.named_parameters())
    batch = two_images()
    for _ in range(STEPS):
        optimizer.zero_grad()
        criterion.begin_step(batch["img"])
        loss, items = student.loss(batch)
        items |= getattr(criterion, "items", {})  # an RT-DETR's loss returns those of its own alone
        loss.sum().backward()
        assert all(torch.isfinite(torch.as_tensor(value)).all() for value in items.values()), items
        for method in plan.config.method_configs:
            assert items[f"{method.name}_loss"] > 0 or method.name in MAYBE_IDLE, items
        assert _any_gradient(adapters.values()) or not adapters
        optimizer.step()


def _any_gradient(parameters: Iterable[Tensor]) -> bool:
    return any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in parameters)
