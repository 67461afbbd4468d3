"""Tables for people: `yolokd methods` and `yolokd check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.utils.torch_utils import parse_device, select_device

from yolokd.config import method_defaults
from yolokd.criterion import build_methods
from yolokd.data import sample_batch
from yolokd.methods import constants_model, registered
from yolokd.plan import Plan, make_plan, training_imgsz, training_keys
from yolokd.precision import fit
from yolokd.probe import level_name
from yolokd.pyramid import Level, LevelShape
from yolokd.trainer import use_all_cores

CONSOLE = Console()


def methods_report() -> None:
    """Print every registered method: paper, what it needs, constants with their defaults."""
    table = Table("method", "paper", "needs", "constants", title="methods (join several with +)", show_lines=True)
    for name, cls in sorted(registered().items()):
        values = method_defaults(name)
        constants = "\n".join(f"{name}.{k}={values.get(k, '')}" for k in ["gain", *constants_model(cls).model_fields])
        table.add_row(name, cls.paper, "maps, class scores" if cls.wants_scores() else "maps", constants)
    table.add_row("none", "plain Ultralytics training", "no teacher", "")
    CONSOLE.print(table)


def check_report(keys: Mapping[str, Any]) -> None:
    """Print what training with these keys would pair, cost and weigh; raises UserError for what it would refuse."""
    full = training_keys(keys)
    plan = make_plan(full)
    imgsz = training_imgsz(full.get("imgsz") or 640, plan)
    CONSOLE.print(_models_table(plan, imgsz))
    if plan.pairing is None:
        CONSOLE.print("method=none: plain Ultralytics training")
        return
    CONSOLE.print(_levels_table(plan.pairing.levels, imgsz))
    CONSOLE.print(_classes_line(plan))
    for note in _teacher_notes(plan, imgsz, full.get("device")):
        CONSOLE.print(f"teacher: {note}")
    for part in plan.config.parts:
        constants = " ".join(f"{part.name}.{k}={v}" for k, v in part.constants.items())
        CONSOLE.print(f"{part.name}: {part.name}.gain={part.gain} {constants}, levels by {plan.config.level_weights}")
    CONSOLE.print("nothing to refuse; nothing was trained")


def _teacher_notes(plan: Plan, imgsz: int, device: object) -> list[str]:
    """How the teacher would run on the training's device, tried on validation pictures."""
    assert plan.teacher is not None
    at, config = select_device(parse_device(device), verbose=False), plan.config
    images = sample_batch(plan.data, imgsz).to(at)
    use_all_cores(at)
    settings = config.teacher_precision, config.teacher_compile, config.teacher_imgsz
    _, notes = fit(plan.teacher.to(at), images, *settings)
    return notes or ["fp32"]


def _models_table(plan: Plan, imgsz: int) -> Table:
    table = Table("model", "parameters", "GFLOPs", title=f"per image of {imgsz}x{imgsz}")
    channels = plan.data["channels"]
    image = torch.zeros(1, channels, imgsz, imgsz)
    rows: dict[str, tuple[nn.Module, Any]] = {"student": (plan.student, image)}
    if plan.teacher_model is not None:
        rows["teacher"] = (plan.teacher_model, image)
    for name, (model, x) in rows.items():
        table.add_row(name, f"{_parameters(model):,}", f"{_gflops(model.eval(), x):.2f}")
    if plan.pairing is not None:
        methods = build_methods(plan.config.parts, plan.pairing.levels, seed=0)
        classes = len(plan.pairing.classes.student) or 1
        levels = [_random_level(shape, imgsz, classes) for shape in plan.pairing.levels]
        flops = sum(_gflops(method, levels) for method in methods)
        table.add_row("adapters (training only)", f"{_parameters(methods):,}", f"{flops:.2f}")
    return table


def _random_level(shape: LevelShape, imgsz: int, classes: int) -> Level:
    grid = imgsz // shape.stride
    student, teacher = (torch.rand(1, c, grid, grid) for c in (shape.student_channels, shape.teacher_channels))
    return Level(shape.stride, student, teacher, *(torch.rand(1, classes, grid, grid) for _ in range(3)))


def _gflops(model: nn.Module, x: Any) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return float(counter.get_total_flops()) / 1e9


def _parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _levels_table(levels: tuple[LevelShape, ...], imgsz: int) -> Table:
    table = Table("level", "stride", "student channels", "teacher channels", "grid", title="levels paired")
    for s in levels:
        grid = imgsz // s.stride
        table.add_row(
            level_name(s.stride), str(s.stride), str(s.student_channels), str(s.teacher_channels), f"{grid}x{grid}"
        )
    return table


def _classes_line(plan: Plan) -> str:
    assert plan.pairing is not None
    assert plan.teacher is not None
    classes, names = plan.pairing.classes, plan.data["names"]
    if classes.objectness:
        return "classes paired: none shared by name; the highest score of each model is one objectness channel"
    missing = [names[i] for i in names if i not in classes.student]
    unknown = f"; unknown to the teacher: {', '.join(missing)}" if missing else ""
    paired = ", ".join(names[i] for i in classes.student[:10]) + (" …" if len(classes.student) > 10 else "")
    return f"classes paired: {len(classes.student)} of {len(names)} ({paired}){unknown}"
