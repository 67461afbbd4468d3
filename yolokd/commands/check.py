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

from yolokd.data.dataset import check_images, sample_batch
from yolokd.distillation.stage import build_methods
from yolokd.models.precision import choose_precision
from yolokd.pyramid.boxes import Labels
from yolokd.pyramid.level import Level, LevelShape, level_name
from yolokd.runtime.console import CONSOLE, print_table
from yolokd.runtime.threads import use_all_cores
from yolokd.training.plan import PairedTeacher, TrainPlan, make_plan, training_imgsz
from yolokd.training.settings import training_keys


def print_check(keys: Mapping[str, Any]) -> None:
    """Print what training with these keys would pair, cost and weigh; raises UserError for what it would refuse."""
    plan = make_plan(training_keys(keys))
    check_images(plan.data, plan.args)
    imgsz = training_imgsz(plan.args.imgsz, plan)
    print_table(_models_table(plan, imgsz))
    if not plan.teachers:
        CONSOLE.print("method=none: plain Ultralytics training")
        return
    at = select_device(parse_device(plan.args.device), verbose=False)
    use_all_cores(at)
    images = sample_batch(plan.data, imgsz).to(at)
    starts = plan.config.starts(plan.args.epochs)
    for paired, start in zip(plan.teachers, starts, strict=True):
        name = Path(paired.file).name
        print_table(_levels_table(paired.pairing.levels, imgsz, f"levels paired with {name}, from epoch {start:g}"))
        CONSOLE.print(paired.pairing.classes.describe(plan.data["names"]))
        for note in _teacher_notes(plan, paired, images):
            CONSOLE.print(f"teacher {name}: {note}")
    balance = plan.config.balance
    for part in plan.config.method_configs:
        settings = " ".join(f"{k}={v}" for k, v in part.flat(balance != "off").items())
        gains = "" if balance == "off" else f"gains for {balance} of the task's gradient at each level, "
        CONSOLE.print(f"{part.name}: {gains}{settings}, levels by {plan.config.level_weights}")
    CONSOLE.print("nothing to refuse; nothing was trained")


def _teacher_notes(plan: TrainPlan, paired: PairedTeacher, images: Tensor) -> list[str]:
    """How a teacher would run on these images' device. images: (B, C, H, W), float in 0..1."""
    config = plan.config
    settings = config.teacher_precision, config.teacher_compile, config.teacher_imgsz
    _, notes = choose_precision(paired.teacher.to(images.device), images, *settings)
    return notes or ["fp32"]


def _models_table(plan: TrainPlan, imgsz: int) -> Table:
    table = Table("model", "parameters", "GFLOPs", title=f"per image of {imgsz}x{imgsz}")
    rows: list[tuple[str, Any, int]] = [("student", plan.student, 1)]
    rows += [(f"teacher {Path(each.file).name}", each.model, max(each.teacher.pyramid)) for each in plan.teachers]
    for name, model, stride in rows:
        side = ceil(imgsz / stride) * stride  # a coarser teacher sees padded images
        image = torch.zeros(1, plan.data["channels"], side, side)
        table.add_row(name, f"{get_num_params(model):,}", f"{_gflops(model.eval(), image):.2f}")
    for paired in plan.teachers:
        methods = build_methods(plan.config.method_configs, paired.pairing.levels, seed=0)
        classes = len(paired.pairing.classes.student) or 1
        levels = [_random_level(shape, imgsz, classes) for shape in paired.pairing.levels]
        flops = sum(_gflops(method, levels) for method in methods)
        table.add_row(f"adapters to {Path(paired.file).name}", f"{get_num_params(methods):,}", f"{flops:.2f}")
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
