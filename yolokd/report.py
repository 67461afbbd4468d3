"""Tables for people: `yolokd methods` and `yolokd check`."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.utils.torch_utils import get_num_params, parse_device, select_device

from yolokd.boxes import Labels
from yolokd.config import SETTINGS, method_defaults
from yolokd.console import CONSOLE, print_table
from yolokd.data import check_images, sample_batch
from yolokd.methods import constants_model, registered
from yolokd.plan import Lesson, Plan, make_plan, training_imgsz, training_keys
from yolokd.precision import fit
from yolokd.pyramid import Level, LevelShape, level_name
from yolokd.stage import build_methods
from yolokd.threads import use_all_cores


def methods_report() -> None:
    """Print every registered method: paper, what it needs, constants with their defaults."""
    table = Table("method", "paper", "needs", "constants", title="methods (join several with +)", show_lines=True)
    for name, cls in sorted(registered().items()):
        values = method_defaults(name)
        shown = [k for k in (*SETTINGS, *constants_model(cls).model_fields) if k in values]
        constants = "\n".join(f"{name}.{k}={values[k]}" for k in shown)
        table.add_row(name, cls.paper, "maps, class scores" if cls.wants_scores() else "maps", constants)
    table.add_row("none", "plain Ultralytics training", "no teacher", "")
    table.caption = "all also take NAME.schedule=cosine, linear or constant, NAME.warmup and NAME.end (in epochs)"
    print_table(table)


def check_report(keys: Mapping[str, Any]) -> None:
    """Print what training with these keys would pair, cost and weigh; raises UserError for what it would refuse."""
    plan = make_plan(training_keys(keys))
    check_images(plan.data, plan.args)
    imgsz = training_imgsz(plan.args.imgsz, plan)
    print_table(_models_table(plan, imgsz))
    if not plan.lessons:
        CONSOLE.print("method=none: plain Ultralytics training")
        return
    at = select_device(parse_device(plan.args.device), verbose=False)
    use_all_cores(at)
    images = sample_batch(plan.data, imgsz).to(at)
    starts = plan.config.starts(plan.args.epochs)
    for lesson, start in zip(plan.lessons, starts, strict=True):
        name = Path(lesson.file).name
        print_table(_levels_table(lesson.pairing.levels, imgsz, f"levels paired with {name}, from epoch {start:g}"))
        CONSOLE.print(lesson.pairing.classes.in_words(plan.data["names"]))
        for note in _teacher_notes(plan, lesson, images):
            CONSOLE.print(f"teacher {name}: {note}")
    balance = plan.config.balance
    for part in plan.config.parts:
        settings = " ".join(f"{k}={v}" for k, v in part.flat(balance != "off").items())
        gains = "" if balance == "off" else f"gains for {balance} of the task's gradient at each level, "
        CONSOLE.print(f"{part.name}: {gains}{settings}, levels by {plan.config.level_weights}")
    CONSOLE.print("nothing to refuse; nothing was trained")


def _teacher_notes(plan: Plan, lesson: Lesson, images: Tensor) -> list[str]:
    """How a teacher would run on these images' device. images: (B, C, H, W), float in 0..1."""
    config = plan.config
    settings = config.teacher_precision, config.teacher_compile, config.teacher_imgsz
    _, notes = fit(lesson.teacher.to(images.device), images, *settings)
    return notes or ["fp32"]


def _models_table(plan: Plan, imgsz: int) -> Table:
    table = Table("model", "parameters", "GFLOPs", title=f"per image of {imgsz}x{imgsz}")
    rows: list[tuple[str, Any, int]] = [("student", plan.student, 1)]
    rows += [(f"teacher {Path(each.file).name}", each.model, max(each.teacher.pyramid)) for each in plan.lessons]
    for name, model, stride in rows:
        side = ceil(imgsz / stride) * stride  # a coarser teacher sees padded images
        image = torch.zeros(1, plan.data["channels"], side, side)
        table.add_row(name, f"{get_num_params(model):,}", f"{_gflops(model.eval(), image):.2f}")
    for lesson in plan.lessons:
        methods = build_methods(plan.config.parts, lesson.pairing.levels, seed=0)
        classes = len(lesson.pairing.classes.student) or 1
        levels = [_random_level(shape, imgsz, classes) for shape in lesson.pairing.levels]
        flops = sum(_gflops(method, levels) for method in methods)
        table.add_row(f"adapters to {Path(lesson.file).name}", f"{get_num_params(methods):,}", f"{flops:.2f}")
    return table


def _random_level(shape: LevelShape, imgsz: int, classes: int) -> Level:
    grid = imgsz // shape.stride
    student, teacher = (torch.rand(1, c, grid, grid) for c in (shape.student_channels, shape.teacher_channels))
    scores, boxes = (torch.rand(1, c, grid, grid) for c in (classes, 4))
    labels = Labels(torch.tensor([0]), torch.tensor([[0.2, 0.2, 0.8, 0.8]]))
    return Level(shape.stride, student, teacher, scores, scores, scores, boxes, boxes, labels)


def _gflops(model: nn.Module, x: Any) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    return float(counter.get_total_flops()) / 1e9


def _levels_table(levels: tuple[LevelShape, ...], imgsz: int, title: str) -> Table:
    table = Table("level", "stride", "student channels", "teacher channels", "grid", title=title)
    for s in levels:
        grid = imgsz // s.stride
        table.add_row(
            level_name(s.stride), str(s.stride), str(s.student_channels), str(s.teacher_channels), f"{grid}x{grid}"
        )
    return table
