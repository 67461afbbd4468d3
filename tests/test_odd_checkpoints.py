"""Checkpoints that contradict themselves: one line of error, exit 2."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_forked
from helpers.models import YOLOV8N, random_detector
from torch import nn

from yolokd import UserError
from yolokd.commands.bench import run_bench
from yolokd.commands.compare import run_compare
from yolokd.models.checkpoint import load_model
from yolokd.training.plan import make_plan


@pytest.fixture(scope="module")
def content() -> bytes:
    """Return a random detector in a pickle, from which each test takes a copy."""
    return pickle.dumps(random_detector())


def with_names(names: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, "names", names)


def with_stride(stride: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, "stride", stride)


def with_yaml(**changes: Any) -> Callable[[Any], None]:
    return lambda model: model.yaml.update(changes)


def repeat_one_number(model: Any) -> None:
    """Replace a weight by a tensor that claims four terabytes and holds four bytes."""
    model.model[0].conv.weight = nn.Parameter(torch.zeros(1).expand(10**12))


ODD: dict[str, tuple[Callable[[Any], None], str]] = {
    "names are numbers": (with_names([0, 1]), "its names: Input should be a valid dictionary"),
    "names are a text": (with_names("ab"), "its names: Input should be a valid dictionary"),
    "names are None": (with_names(None), "its names: Input should be a valid dictionary"),
    "no names": (lambda model: delattr(model, "names"), "its names: Input should be a valid dictionary"),
    "a name is a number": (with_names({0: "disc", 1: 5}), "its names.1: Input should be a valid string"),
    "an index is a text": (with_names({"0": "disc", 1: "box"}), "its names.0: Input should be a valid integer"),
    "names too few": (with_names({0: "disc"}), "contradicts itself: 2 class channels, nc=2 and 1 names"),
    "names with a gap": (with_names({0: "disc", 2: "box"}), "its names: must count 2 classes from 0"),
    "a surrogate": (with_names({0: "disc", 1: "\udcff"}), "its names.1: "),
    "100,000 names": (with_names(dict(enumerate(map(str, range(10**5))))), "at most 10000 items"),
    "no class branch": (lambda model: delattr(model.model[-1], "cv3"), "contradicts itself: 0 class channels"),
    "no box branch": (lambda model: delattr(model.model[-1], "cv2"), "does not run on an image of 3 channels"),
    "nc lies": (lambda model: setattr(model.model[-1], "nc", 3), "contradicts itself: 2 class channels, nc=3"),
    "nc is a text": (lambda model: setattr(model.model[-1], "nc", "2"), "its nc: Input should be a valid integer"),
    "reg_max lies": (lambda model: setattr(model.model[-1], "reg_max", 7), "does not run on an image"),
    "stride is a text": (with_stride("8"), "its stride: Input should be an instance of Tensor"),
    "stride lies": (with_stride(torch.tensor([8.0, 16.0, 1e12])), "claims the strides [8.0, 16.0, 9"),
    "channels lie": (with_yaml(channels=4), "does not run on an image of 4 channels"),
    "channels are a text": (with_yaml(channels="3"), "its yaml.channels: Input should be a valid integer"),
    "terabytes": (repeat_one_number, "not a readable checkpoint: a tensor claims 4000000000000 bytes"),
    "a layer is gone": (lambda model: model.model.__delitem__(5), "does not run on an image of 3 channels"),
    "no layers": (lambda model: setattr(model, "model", nn.Sequential()), "not a readable checkpoint"),
}  # fmt: skip


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest, content: bytes, tmp_path: Path) -> tuple[str, str]:
    """Return the path of a checkpoint that contradicts itself, and the problem that the error has to name."""
    change, problem = ODD[request.param]
    model = pickle.loads(content)
    change(model)
    path = tmp_path / "odd.pt"
    torch.save({"model": model, "train_args": {}}, path)
    return str(path), problem


@pytest.mark.parametrize("argument", ["teacher", "student"])
def test_a_checkpoint_that_contradicts_itself_is_refused(argument: str, odd: tuple[str, str], data: str) -> None:
    path, problem = odd
    models = {"teacher": path} if argument == "teacher" else {"method": "none", "model": path}
    with pytest.raises(UserError) as caught:
        make_plan({"model": "yolov8n.yaml", "data": data} | models)
    message = str(caught.value)
    assert problem in message
    assert message.startswith(f"{argument}={path}: ")
    assert len(message) < 400
    message.encode()


@pytest.mark.parametrize("case", ["names are numbers", "a surrogate", "nc lies", "terabytes"])
def test_the_command_line_refuses_an_odd_checkpoint_in_one_line(
    case: str, content: bytes, data: str, tmp_path: Path
) -> None:
    model = pickle.loads(content)
    ODD[case][0](model)
    torch.save({"model": model, "train_args": {}}, tmp_path / "odd.pt")
    arguments = ("check", "teacher=odd.pt", f"data={data}", "imgsz=64")
    done = run_forked(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("yolokd: error: teacher=odd.pt: ")
    assert ODD[case][1] in line
    assert [path.name for path in tmp_path.iterdir()] == ["odd.pt"]


@pytest.mark.parametrize("command", [run_bench, run_compare])
def test_native_distillation_gets_no_odd_teacher(
    command: Callable[..., Any], content: bytes, data: str, tmp_path: Path
) -> None:
    model = pickle.loads(content)
    ODD["stride lies"][0](model)
    torch.save({"model": model, "train_args": {}}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="claims the strides"):
        command(teacher=str(tmp_path / "odd.pt"), method="native", data=data, project=str(tmp_path / "p"))
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"epoch": "3"}, "its epoch: Input should be a valid integer"),
        ({"epoch": 1.5}, "its epoch: Input should be a valid integer"),
        ({"epoch": None}, "its epoch: Input should be a valid integer"),
        ({"train_args": {3: 64}}, "its train_args.3: Input should be a valid string"),
        ({"optimizer": "adam"}, "its optimizer: Input should be"),
        ({"optimizer": {"param_groups": {"params": [0]}}}, "its optimizer.param_groups: Input should be a valid list"),
        ({"optimizer": {"param_groups": [{"lr": 0.1}]}}, "its optimizer.param_groups.0.params: Field required"),
        (
            {"optimizer": {"param_groups": [{"params": [0, "1"]}]}},
            "its optimizer.param_groups.0.params.1: ",
        ),
        ({"optimizer": {"param_groups": [{"params": []}]}, "epoch": 2, "train_args": {"imgsz": 64}}, ""),
        ({"optimizer": {}}, ""),
        ({"optimizer": None, "epoch": -1}, ""),
    ],
)
def test_what_a_checkpoint_says_of_its_training_has_the_right_types(
    change: dict[str, Any], problem: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "odd.pt"
    torch.save({"model": pickle.loads(content), "train_args": {}} | change, path)
    if not problem:
        assert change.items() <= load_model(path, "resume")[1].items()
        return
    with pytest.raises(UserError, match=re.escape(f"resume={path}: {problem}")):
        load_model(path, "resume")


def test_a_teacher_whose_maps_or_scores_are_not_finite_is_refused(content: bytes, data: str, tmp_path: Path) -> None:
    for weight, value, problem in (
        ("model.0.conv.weight", nan, "its feature maps at stride 8 are not finite on a validation image"),
        ("model.15.conv.weight", 3e38, "its feature maps at stride 8 are not finite"),
        ("model.22.cv3.1.2.bias", nan, "its class scores at stride 16 are not finite"),
        ("model.22.cv2.2.2.bias", inf, "its boxes at stride 32 are not finite"),
    ):
        model = pickle.loads(content)
        model.state_dict()[weight].fill_(value)
        path = tmp_path / "teacher.pt"
        torch.save({"model": model, "train_args": {}}, path)
        with pytest.raises(UserError) as caught:
            make_plan({"teacher": str(path), "model": YOLOV8N, "data": data})
        assert f"teacher={path}: {problem}" in str(caught.value)
