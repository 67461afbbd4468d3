"""Students of gray and multispectral images, with a teacher of three channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import YOLOV8N, YOLOV8S, random_detector
from helpers.results import rows
from helpers.runs import distil

from yolokd import UserError
from yolokd.models.evaluate import aligned_copy
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.training.plan import make_plan


@pytest.fixture
def gray(data: str, tmp_path: Path) -> str:
    """Return the .yaml of the small data set, whose images are read as gray."""
    content = yaml.safe_load(Path(data).read_text()) | {"path": str(Path(data).parent), "channels": 1}
    (tmp_path / "gray.yaml").write_text(yaml.safe_dump(content))
    return str(tmp_path / "gray.yaml")


@pytest.mark.parametrize(("channels", "chosen", "seen"), [(1, None, [0, 0, 0]), (5, [4, 1, 4], [3, 0, 3])])
def test_the_teacher_sees_the_channels_that_are_chosen(
    channels: int, chosen: list[int] | None, seen: list[int]
) -> None:
    model, images = random_detector(YOLOV8S), torch.rand(2, channels, 64, 64)
    teacher = detector_teacher(model)
    maps = teacher.for_images(channels, chosen)(images).maps
    for stride, expected in teacher(images[:, seen]).maps.items():
        assert torch.equal(maps[stride], expected)
    mapping = {0: (0,), 1: (1,)}
    copies = [aligned_copy(model, model.names, mapping, channels=c) for c in (tuple(seen), None)]
    assert torch.equal(copies[0](images)[0], copies[1](images[:, seen])[0])


def test_a_teacher_of_colours_teaches_on_gray_images_and_is_scored_on_them(
    gray: str, tiny: dict[str, Any], teacher: str
) -> None:
    keys = tiny | {"data": gray, "epochs": 1, "check_teacher": True}
    d = distil(teacher, YOLOV8N, keys, method="fitnet")
    assert d.trainer.plan.student.yaml["channels"] == 1
    assert d.trainer.teacher_score is not None
    assert rows(d.trainer)[0]["train/fitnet_loss"] > 0


def test_channels_that_do_not_fit_are_refused(data: str, gray: str, teacher: str, tmp_path: Path) -> None:
    content = yaml.safe_load(Path(gray).read_text()) | {"channels": 8}
    (tmp_path / "eight.yaml").write_text(yaml.safe_dump(content))
    keys = {"teacher": teacher, "model": YOLOV8N, "device": "cpu"}
    eight = keys | {"data": str(tmp_path / "eight.yaml")}
    for given, message in (
        (eight, "takes 3 channels, the data 8 .say which it sees, for example teacher_channels="),
        (eight | {"teacher_channels": [1, 2]}, "does not fit the teacher and the data .give 3 numbers from 1 to 8"),
        (eight | {"teacher_channels": [1, 2, 9]}, "does not fit the teacher and the data"),
        (keys | {"data": data, "teacher_channels": [1, 2, 0]}, "greater than or equal to 1"),
    ):
        with pytest.raises(UserError, match=message):
            make_plan(given)
