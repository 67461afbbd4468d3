"""The teacher's score before a training."""

from __future__ import annotations

from pathlib import Path

import cv2
import pytest
import torch
from helpers.data import write_dataset
from helpers.models import YOLOV8N, YOLOV8S, calibrated_detector, label_with
from ultralytics import YOLO

from yolokd.training.plan import make_plan
from yolokd.training.teachers import score_teachers


def test_the_teacher_is_scored_on_the_classes_that_are_trained(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d")
    images = [cv2.imread(str(path)) for path in sorted((data.parent / "images" / "val").glob("*.jpg"))]
    teacher = tmp_path / "t.pt"
    label_with(calibrated_detector(YOLOV8S, images, 192), data, 192, teacher)
    common = {"data": str(data), "imgsz": 192, "device": "cpu", "workers": 0}
    scores = []
    for classes in ([0], [1]):
        plan = make_plan(common | {"teacher": str(teacher), "model": YOLOV8N, "classes": classes})
        scores.append(score_teachers(plan, plan.args, torch.device("cpu"), batch=3, save_dir=tmp_path))
        val = YOLO(teacher).val(**common, classes=classes, batch=6, plots=False, project=str(tmp_path))
        assert scores[-1] == pytest.approx(val.box.map, abs=1e-6)
    assert scores[0] != scores[1]
    assert min(scores) > 0
