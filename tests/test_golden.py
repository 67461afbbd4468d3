"""The losses, compared with numbers that the authors' released code gives on the same tensors.

Each file in data/golden names a method, a repository and commit, the code that was run, and its cases: constants as
that code names them, a seed, shapes of the levels (B, C, H, W), and the value. The values were computed once, in
float64, by that code as it is, on the tensors that `draw_levels` makes of the seed. Both maps have the same channels,
and no adapter lies between them. A function for each file, below, computes the same from our loss. It says which factor
lies between the two, and why.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from yolokd.config.defaults import method_defaults
from yolokd.config.schema import METHOD_SETTINGS
from yolokd.methods import Method, registered
from yolokd.methods.blocks import Adapter
from yolokd.methods.features.pdf import PDF
from yolokd.pyramid.boxes import Labels
from yolokd.pyramid.level import Level, LevelShape

FOLDER = Path(__file__).parent / "data" / "golden"
Case = dict[str, Any]
Numbers = np.random.RandomState  # NumPy promises that its numbers never change; torch does not


def cases_in(name: str) -> Iterator[Case]:
    for source in json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")):
        for case in source["cases"]:
            yield source | case


def draw(numbers: Numbers, *shape: int) -> Tensor:
    return torch.from_numpy(numbers.standard_normal(shape).astype(np.float32))


def draw_levels(case: Case) -> tuple[list[Level], Numbers]:
    """Return the levels of a case, and the generator for what else it needs."""
    numbers = Numbers(case["seed"])
    levels = []
    for b, c, h, w in case["levels"]:
        level = Level(8, draw(numbers, b, c, h, w), draw(numbers, b, c, h, w))
        if classes := case.get("classes"):
            level.student_logits, level.teacher_logits = (2 * draw(numbers, b, classes, h, w) for _ in range(2))
            level.teacher_mean_logits = level.teacher_logits
        levels.append(level)
    return levels, numbers


def build(name: str, level: Level, **constants: Any) -> Any:
    """Return the method for a level, with an identity for an adapter."""
    channels = level.teacher.shape[1]
    defaults = {k: v for k, v in method_defaults(name).items() if k not in METHOD_SETTINGS}
    method = registered()[name](LevelShape(8, channels, channels), **defaults | constants)
    adapter = Adapter(LevelShape(8, channels, channels))
    nn.init.dirac_(adapter.weight)  # the identity
    nn.init.zeros_(adapter.bias)
    setattr(method, "project" if name == "sl2" else "adapt", adapter)
    return method.requires_grad_(False)


def draw_parameters(module: nn.Module, numbers: Numbers) -> None:
    for parameter in module.parameters():
        parameter.copy_(0.3 * draw(numbers, *parameter.shape))


def bckd(case: Case) -> float:
    """Return BCKD's loss of class scores. Theirs is a sum over positions, ours a mean over positions and batch.

    Their loss of boxes is not compared: it has the GIoU.
    """
    total = 0.0
    for level in draw_levels(case)[0]:
        b, _, h, w = level.teacher.shape
        total += float(build("bckd", level, alpha_1=1.0, alpha_2=0.0)(level)) * b * h * w
    return total


def frs(case: Case) -> float:
    """Return FRS's loss. Theirs sums the feature error over channels, ours is a mean: α is C times their weight."""
    weights = case["constants"]
    total = 0.0
    for level in draw_levels(case)[0]:
        alpha = weights["distill_feat_weight"] * level.teacher.shape[1]
        total += float(build("frs", level, alpha=alpha, beta=weights["distill_cls_weight"])(level))
    return total


def ld(case: Case) -> float:
    """Return LD's loss, of an image's whole pyramid.

    Theirs is a sum over positions, ours a mean over positions and batch. Theirs takes the mean over bins, ours the sum.
    Theirs divides the loss of the valuable region by another 4.
    """
    numbers, constants, bins = Numbers(case["seed"]), case["constants"], case["bins"]
    boxes = torch.tensor(case["boxes"])
    labels, weight = Labels(boxes[:, 0].long(), boxes[:, 1:]), constants["loss_weight"]
    total = 0.0
    for stride, valuable in zip(case["strides"], case["valuable"], strict=True):
        h, w = (side // stride for side in case["size"])
        level = Level(stride, torch.zeros(2, 1, h, w), torch.zeros(2, 1, h, w), labels=labels)
        level.student_box_logits, level.teacher_box_logits = (
            3 * draw(numbers, 2, 4 * bins, h, w).view(2, 4, bins, h, w) for _ in range(2)
        )
        level.assigned = torch.from_numpy(numbers.random_sample((2, h, w))) < 0.3
        method = build("ld", level, tau=float(constants["T"]), main=weight, valuable=weight / 4)
        method.strides = tuple(case["strides"])
        assert int(method.region(level).sum()) == valuable
        total += float(method(level)) * 2 * h * w / bins
    return total


def fgd(case: Case) -> float:
    """Return FGD's loss.

    Theirs has sums, ours has means: over C channels for α and β, over C·H·W values for λ. Their attention loss sums the
    channels' part over C and the positions' part over H·W. One γ of ours equals that only if C = H·W: so it is in the
    cases with γ above 0.

    Their boxes cover one column more at the right and one row more below, so ours are first made larger by one cell.
    None of these boxes reaches the right or lower border.
    """
    levels, numbers = draw_levels(case)
    return sum(float(build_fgd(case, level, numbers)(with_larger_boxes(case, level, cells=1))) for level in levels)


def fgd_border(case: Case) -> float:
    """Return FGD's loss of boxes, α alone, where each box covers its whole image.

    Their boxes are one cell wider and higher, also beyond the border: each of the H·W cells counts 1/((H+1)·(W+1)).
    Ours counts 1/(H·W), so that the cells of a box sum to 1.
    """
    levels, numbers = draw_levels(case)
    total = 0.0
    for level in levels:
        h, w = level.teacher.shape[-2:]
        ours = build_fgd(case, level, numbers)(with_larger_boxes(case, level, cells=0))
        total += float(ours) * (h * w) / ((h + 1) * (w + 1))
    return total


def build_fgd(case: Case, level: Level, numbers: Numbers) -> Method:
    """Return FGD with their constants. Both of their context blocks got the parameters that our single one gets."""
    theirs, (_, c, h, w) = case["constants"], level.teacher.shape
    assert theirs["gamma_fgd"] == 0 or c == h * w
    method: Method = build(
        "fgd",
        level,
        alpha=theirs["alpha_fgd"] * c,
        beta=theirs["beta_fgd"] * c,
        gamma=theirs["gamma_fgd"] * c,
        lambda_=theirs["lambda_fgd"] * c * h * w,
        temperature=theirs["temp"],
    )
    draw_parameters(method.context, numbers)
    return method


def with_larger_boxes(case: Case, level: Level, cells: int) -> Level:
    """Return the level with the case's boxes, each larger by a number of cells at the right and below."""
    boxes = torch.tensor(case["boxes"]).view(-1, 5)
    corners = boxes[:, 1:].clone()
    corners[:, 2:] += cells / torch.tensor([level.teacher.shape[-1], level.teacher.shape[-2]])
    level.labels = Labels(boxes[:, 0].long(), corners)
    return level


def mgd(case: Case) -> float:
    """Return MGD's loss. Theirs is a sum over channels and positions, ours a mean: the factor is C·H·W.

    Theirs masks where a number of 0..1 is above 1 − λ, ours where it is below λ: ours gets 1 minus their numbers.
    """
    levels, numbers = draw_levels(case)
    theirs, total = case["constants"], 0.0
    for level in levels:
        b, c, h, w = level.teacher.shape
        method = build("mgd", level, lambda_=theirs["lambda_mgd"])
        draw_parameters(method.generate, numbers)
        uniform = torch.from_numpy(numbers.random_sample((b, 1, h, w)))
        level.draw_uniform = lambda *_, uniform=uniform: 1 - uniform
        total += theirs["alpha_mgd"] * c * h * w * float(method(level))
    return total


def pkd(case: Case) -> float:
    """Return PKD's loss. Theirs divides by n − 1 for the variance of n values, ours by n: the factor is (n − 1)/n."""
    total = 0.0
    for level in draw_levels(case)[0]:
        n = level.teacher[:, 0].numel()
        total += float(build("pkd", level)(level)) * (n - 1) / n
    return case["constants"]["loss_weight"] * total


def cwd(case: Case) -> float:
    """Return CWD's loss. No factor lies between."""
    theirs = case["constants"]
    tau = theirs["tau"] if "tau" in theirs else theirs["temperature"]
    return sum(float(build("cwd", level, tau=tau)(level)) for level in draw_levels(case)[0])


PDF_MODES = {
    "pdf": ("l2", "soft"),  # their last release
    "pad_euc": ("euclidean", "soft"),  # this and the others: release 1.1
    "pad_l1": ("l1", "soft"),
    "pad_kl": ("kl", "soft"),
    "most-diff": ("l1", "most50"),
    "most-diff2": ("l1", "most25"),
}


def pdf(case: Case) -> float:
    """Return PDF-Distil's loss, with scope=batch. Theirs has a weight of its own; ours is the mean over levels."""
    theirs, (levels, _) = case["constants"], draw_levels(case)
    distance, weighting = PDF_MODES[theirs["mode"]]
    methods = [build("pdf", level, distance=distance, weighting=weighting, scope="batch") for level in levels]
    weight: float = theirs.get("factor", theirs.get("loss_weight"))
    return weight * float(torch.stack(PDF.losses(methods, levels)).mean())


def sl2(case: Case) -> float:
    """Return SL2's loss. Theirs has the weight `dis`."""
    levels = draw_levels(case)[0]
    return case["constants"]["dis"] * sum(float(build("sl2", level)(level)) for level in levels)


COMPUTE: dict[str, Callable[[Case], float]] = {
    "bckd": bckd,
    "cwd": cwd,
    "fgd": fgd,
    "fgd_border": fgd_border,
    "frs": frs,
    "ld": ld,
    "mgd": mgd,
    "pdf": pdf,
    "pkd": pkd,
    "sl2": sl2,
}


@pytest.mark.parametrize(
    ("name", "case"),
    [pytest.param(name, case, id=f"{name}-{case['seed']}") for name in COMPUTE for case in cases_in(name)],
)
def test_a_loss_equals_that_of_its_authors_code(name: str, case: Case) -> None:
    assert COMPUTE[name](case) == pytest.approx(case["value"], rel=1e-5)


def test_fgds_boxes_cover_less_than_those_of_its_authors_code() -> None:
    """Without the added cell the losses of boxes differ by more than rounding: the cell is needed, and is all."""
    for case in cases_in("fgd"):
        levels, numbers = draw_levels(case)
        plain = sum(float(build_fgd(case, level, numbers)(with_larger_boxes(case, level, cells=0))) for level in levels)
        box_terms = case["boxes"] and (case["constants"]["alpha_fgd"] or case["constants"]["beta_fgd"])
        assert (plain == pytest.approx(case["value"], rel=1e-3)) is not bool(box_terms)
