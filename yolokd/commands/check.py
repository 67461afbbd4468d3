"""`yolokd check`: prints what a training would do, without training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import ceil
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.utils.torch_utils import get_num_params, parse_device, select_device

from yolokd.data.dataset import boxes_per_class, sample_batch
from yolokd.distillation.per_level import build_methods
from yolokd.models.detector import rounded_imgsz
from yolokd.models.tasks import scored_task, task_of
from yolokd.models.teachers.backbone import Backbone
from yolokd.models.teachers.precision import choose_precision, name_of
from yolokd.pyramid.boxes import Labels
from yolokd.pyramid.head import Head
from yolokd.pyramid.level import Level, LevelShape, level_name
from yolokd.pyramid.pairing import ClassSelection
from yolokd.runtime.console import CONSOLE, print_table
from yolokd.runtime.threads import use_all_cores
from yolokd.training.plan import PairedTeacher, TrainPlan, check_data, make_plan, with_unlabelled_images
from yolokd.training.settings import images_per_batch, training_keys


def print_check(keys: Mapping[str, Any]) -> None:
    """Print how a training with these keys would pair teacher and student, what it would cost, and its settings.

    Trains nothing. Raises UserError for what the training would refuse.
    """
    plan = make_plan(training_keys(keys))
    check_data(plan)
    plan = with_unlabelled_images(plan)
    imgsz = rounded_imgsz(plan.args.imgsz, plan.student)
    print_table(_models_table(plan, imgsz))
    if not plan.teachers:
        CONSOLE.print("method=none: plain Ultralytics training, without a teacher")
    else:
        _print_teachers(plan, imgsz)
        _print_methods(plan)
    if plan.unlabelled:
        labelled = int(plan.args.batch)
        batch = f"{images_per_batch(plan.config, labelled) - labelled} join the {labelled} labelled ones of a batch"
        CONSOLE.print(f"unlabelled images: {len(plan.unlabelled)}; {batch}")
    CONSOLE.print("ready to train: `yolokd train` accepts these settings; nothing was trained")


def _print_teachers(plan: TrainPlan, imgsz: int) -> None:
    device = select_device(parse_device(plan.args.device), verbose=False)
    use_all_cores(device)
    images = sample_batch(plan.data, imgsz).to(device)
    starts = plan.config.starts(plan.args.epochs)
    boxes = boxes_per_class(plan.data, plan.args, plan.config.trust)
    for paired, start in zip(plan.teachers, starts, strict=True):
        name = paired.name
        when = "throughout, in an ensemble" if plan.config.teachers == "ensemble" else f"from epoch {start:g}"
        title = f"pyramid levels paired with teacher {name}, which teaches {when}"
        print_table(_levels_table(paired.pairing.levels, imgsz, title))
        for level in _unpaired_levels(paired):
            CONSOLE.print(
                f"level {level} of the student has no partner in teacher {name}: it learns from the labels alone"
            )
        CONSOLE.print(paired.pairing.classes.describe(plan.names, paired.teacher.names))
        if not isinstance(paired.model, Backbone):
            for line in _describe_tasks(plan, paired):
                CONSOLE.print(f"teacher {name}: {line}")
        if paired.teacher.names:
            known, total = sum(boxes[i] for i in paired.pairing.classes.student), boxes.total()
            share = f"{known} of {total} ({known / max(total, 1):.0%})"
            CONSOLE.print(f"labelled training boxes of a class that teacher {name} knows: {share}")
        for line in _describe_precision(plan, paired, images):
            CONSOLE.print(f"teacher {name}: {line}")


def _describe_tasks(plan: TrainPlan, paired: PairedTeacher) -> list[str]:
    """Return lines on what both models predict beside class scores and upright boxes, which no method shares."""
    task, taught_by = plan.task, task_of(paired.model)
    lines = []
    if task.own:
        also = "although it predicts them, too" if taught_by is task else "which it does not predict"
        lines.append(f"shares feature maps and class scores; {task.own}, {also}, are learned from the labels alone")
    elif taught_by is not None and taught_by.own:
        lines.append(f"its {taught_by.own} are not used")
    if scored_task(paired.model, task, plan.data) is not task:
        lines.append(f"its score will not be comparable with the student's, {task.score_name}")
    return lines


def _unpaired_levels(paired: PairedTeacher) -> list[str]:
    """Return the names of the student's levels at whose strides the teacher has none, finest first."""
    shared = {shape.stride for shape in paired.pairing.levels}
    return [level_name(stride) for stride in sorted(paired.pairing.student_strides) if stride not in shared]


def _describe_precision(plan: TrainPlan, paired: PairedTeacher, images: Tensor) -> list[str]:
    """Return lines on the precision in which a teacher would run on the device of `images`.

    images: (B, C, H, W), float in 0..1.
    """
    config = plan.config
    batch = images_per_batch(config, int(plan.args.batch)) if config.teacher_compile else None
    settings = config.teacher_precision, config.teacher_imgsz, batch, config.teacher_compile
    teacher, notes = choose_precision(paired.teacher.to(images.device), images, *settings)
    return [*notes, f"runs in {name_of(teacher.settings.dtype)} on {images.device}"]


def _print_methods(plan: TrainPlan) -> None:
    balance = plan.config.balance
    shared = " ".join(f"{key}={getattr(plan.config, key)}" for key in ("level_weights", "level_floor", "adapter"))
    for method in plan.config.method_configs:
        if balance == "off":
            gains = "fixed gain"
        else:
            gains = f"gains keep its gradient at {balance:g} times the YOLO loss's, on average over the levels"
        settings = " ".join(f"{k}={v}" for k, v in method.flat(balance != "off").items())
        CONSOLE.print(f"method {method.name}: {gains}; {shared} {settings}")


def _models_table(plan: TrainPlan, imgsz: int) -> Table:
    """Return a table of parameters and GFLOPs: of the student, of each teacher, and of the adapters to it."""
    table = Table("model", "parameters", "GFLOPs", title=f"forward pass of one {imgsz}x{imgsz} image")
    models: list[tuple[str, Any, int, int]] = [("student", plan.student, 1, plan.data["channels"])]
    models += [(f"teacher {p.name}", p.model, max(p.teacher.pyramid), p.teacher.channels) for p in plan.teachers]
    for name, model, stride, channels in models:
        side = ceil(imgsz / stride) * stride  # a teacher with a larger stride sees padded images
        image = torch.zeros(1, channels, side, side)
        table.add_row(name, f"{get_num_params(model):,}", f"{_gflops(model.eval(), image):.2f}")
    for paired in plan.teachers:
        config = plan.config
        methods = build_methods(config.method_configs, paired.pairing.levels, seed=0, adapter=config.adapter)
        classes = len(paired.pairing.classes.student) or 1
        select = ClassSelection(paired.pairing.classes.teacher)  # as in a training
        heads = {stride: replace(head, select=select) for stride, head in paired.teacher.heads.items()}
        levels = [_random_level(shape, imgsz, classes, heads) for shape in paired.pairing.levels]
        flops = sum(_gflops(method, levels) for method in methods)
        name = f"adapters to teacher {paired.name} (in training only)"
        table.add_row(name, f"{get_num_params(methods):,}", f"{flops:.2f}")
    return table


def _random_level(shape: LevelShape, imgsz: int, classes: int, heads: Mapping[int, Head]) -> Level:
    """Return a level of one image with random maps, class scores and boxes, on which to count FLOPs.

    heads: the teacher's at each stride, if it has any.
    """
    grid = imgsz // shape.stride
    student, teacher = (torch.rand(1, c, grid, grid) for c in (shape.student_channels, shape.teacher_channels))
    scores, boxes = (torch.rand(1, c, grid, grid) for c in (classes, 4))
    labels = Labels(torch.tensor([0]), torch.tensor([[0.2, 0.2, 0.8, 0.8]]))
    level = Level(shape.stride, student, teacher, scores, scores, scores, boxes, boxes, labels)
    level.assigned, level.teacher_head = torch.ones(1, grid, grid) > 0, heads.get(shape.stride)
    bins = level.teacher_head.bins if level.teacher_head is not None else 1
    level.student_box_logits = level.teacher_box_logits = torch.rand(1, 4, bins, grid, grid)
    if shape.student_head is not None:
        channels = zip(shape.student_head.box_channels, shape.student_head.class_channels, strict=True)
        for depth, (box, cls) in enumerate(channels):
            level.head_maps[depth] = torch.rand(1, box, grid, grid), torch.rand(1, cls, grid, grid)
    return level


def _gflops(model: nn.Module, inputs: Any) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs)
    return float(counter.get_total_flops()) / 1e9


def _levels_table(levels: tuple[LevelShape, ...], imgsz: int, title: str) -> Table:
    table = Table("level", "stride", "student channels", "teacher channels", "student grid", title=title)
    for shape in levels:
        stride, cells = shape.stride, imgsz // shape.stride
        channels = str(shape.student_channels), str(shape.teacher_channels)
        table.add_row(level_name(stride), str(stride), *channels, f"{cells}x{cells}")
    return table
