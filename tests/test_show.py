"""`yolokd show`: maps of two models as pictures."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import pytest
from helpers.models import YOLOV8N
from helpers.tasks import write_model

from yolokd import UserError
from yolokd.commands.show import run_show


def test_an_image_and_its_maps_are_drawn_for_a_student_that_has_not_been_trained(
    data: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"teacher": teacher, "student": YOLOV8N, "source": data, "split": "val", "imgsz": 64, "device": "cpu"}
    folders = [run_show(**keys, method=method, count=1, project=str(tmp_path)) for method in ("dfd,pdf", "frs")]
    assert [folder.name for folder in folders] == ["show", "show-2"]
    printed = capsys.readouterr().out
    assert "1 of 6 images were drawn" in printed
    assert "DFD splits" in printed
    drawn = [cv2.imread(str(file)) for folder in folders for file in folder.iterdir()]
    heights, widths, _ = zip(*(picture.shape for picture in drawn), strict=True)
    assert heights[0] == heights[1]
    assert widths[0] / widths[1] == pytest.approx(6 / 4, rel=0.02)  # the image, two attentions, and three maps or one
    assert all(picture.std() > 20 for picture in drawn)


def test_a_student_that_finds_poses_is_drawn(data: str, teacher: str, tmp_path: Path) -> None:
    student = write_model(tmp_path, "pose")
    keys = {"teacher": teacher, "student": student, "source": data, "imgsz": 64, "count": 1, "device": "cpu"}
    assert len(list(run_show(**keys, method="frs", project=str(tmp_path)).iterdir())) == 1


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"method": "fgd"}, "'fgd' has no maps to show"), ({"student": None}, "student: is missing"),
        ({"source": "nowhere"}, "is no folder, list or data set"), ({"count": 0}, "count=0"), ({"x": 1}, "unknown key"),
        ({"student": "s"}, "is neither .yaml nor .pt"),
        ({"classes_map": {"foo": "disc"}}, "classes_map: the teacher has no class 'foo'"),
        ({"classes_map": {"disc": "foo"}}, "classes_map: the student has no class 'foo'"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_named(
    keys: dict[str, Any], problem: str, data: str, teacher: str, tmp_path: Path
) -> None:
    given = {"teacher": teacher, "student": YOLOV8N, "source": data, "project": str(tmp_path), "device": "cpu"}
    with pytest.raises(UserError, match=problem):
        run_show(**given | keys)
    assert list(tmp_path.iterdir()) == []


def test_images_that_cannot_be_read_are_counted(
    data: str, teacher: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(Path(data).parent / "images" / "val", images)
    (images / "broken.jpg").write_bytes(b"no image")
    keys = {"teacher": teacher, "student": YOLOV8N, "source": str(images), "imgsz": 64, "device": "cpu"}
    assert len(list(run_show(**keys, method="frs", project=str(tmp_path)).iterdir())) == 6
    assert "1 images cannot be read: they are left out" in capsys.readouterr().out
