"""The pictures of a report: outlines of masks, rotated boxes and keypoints, of labels and of detections."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from helpers.models import calibrate
from helpers.tasks import random_model, save_model, write_data, write_model
from ultralytics import YOLO

from yolokd.commands.report import run_report
from yolokd.data.dataset import load_data, validation_images
from yolokd.report.pictures import TOLERANCE

SIZE = 128  # pixels, of the embedded images and of the models' square
CORNERS = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) / 2  # of a box, as shares of its sides from its center

Points = Any  # (K, 2), pixels
Objects = list[tuple[Points, Points]]  # the outline and the keypoints of each object


def labelled(file: Path, task: str) -> Objects:
    """Return the objects of a label file."""
    objects = []
    for line in file.read_text().splitlines():
        numbers = np.array(line.split()[1:], float)
        if task == "pose":
            keypoints = numbers[4:].reshape(-1, 3)
            objects.append((numbers[:2] + CORNERS * numbers[2:4], keypoints[keypoints[:, 2] > 0, :2]))
        else:
            objects.append((numbers.reshape(-1, 2), np.zeros((0, 2))))
    return [(outline * SIZE, keypoints * SIZE) for outline, keypoints in objects]


def detected(result: Any) -> Objects:
    """Return the objects that Ultralytics found in an image."""
    if result.obb is not None:
        return [(corners, np.zeros((0, 2))) for corners in result.obb.xyxyxyxy.numpy()]
    boxes = result.boxes.xyxy.numpy().reshape(-1, 2, 2)
    outlines: list[Any] = [box.mean(0) + CORNERS * np.diff(box, axis=0) for box in boxes]
    if result.masks is not None:
        drawn = zip(result.masks.xy, outlines, strict=True)
        return [(outline if len(outline) else box, np.zeros((0, 2))) for outline, box in drawn]
    points, scores = result.keypoints.xy.numpy(), result.keypoints.conf.numpy()
    return [(o, found[score > 0.5]) for o, found, score in zip(outlines, points, scores, strict=True)]


def drawn(panel: str) -> Objects:
    """Return the objects of a panel of the page."""
    objects = []
    for path in re.findall(r'<path d="(.*?)"', panel):
        pieces = [np.array([p.split() for p in piece.split("L")], float) for piece in re.findall(r"M(.*?)z", path)]
        objects.append((pieces[0], np.array([diamond.mean(0) for diamond in pieces[1:]]).reshape(-1, 2)))
    return objects


def assert_same_outline(outline: Points, expected: Points) -> None:
    """Compare areas and upright boxes. The page may move an outline by TOLERANCE, and its numbers have one decimal."""
    ours, theirs = (np.clip(points, 0, SIZE).astype(np.float32) for points in (outline, expected))
    length = cv2.arcLength(theirs, closed=True)
    assert cv2.contourArea(ours) == pytest.approx(cv2.contourArea(theirs), abs=(TOLERANCE + 0.05) * length)
    assert ours.min(0) == pytest.approx(theirs.min(0), abs=TOLERANCE + 0.06)
    assert ours.max(0) == pytest.approx(theirs.max(0), abs=TOLERANCE + 0.06)


def assert_same(found: Objects, expected: Objects) -> None:
    assert len(found) == len(expected)
    for (outline, keypoints), (its_outline, its_keypoints) in zip(found, expected, strict=True):
        assert_same_outline(outline, its_outline)
        assert keypoints == pytest.approx(np.clip(its_keypoints, 0, SIZE), abs=0.11)


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_a_report_draws_labels_and_detections_as_the_task_has_them(task: str, tmp_path: Path) -> None:
    data, weights = write_data(tmp_path, task), tmp_path / "run" / "weights"
    weights.mkdir(parents=True)
    model = calibrate(random_model(write_model(tmp_path, task), task), validation_images(data), SIZE)
    save_model(weights / "best.pt", model, task)
    settings = {"data": data, "imgsz": SIZE, "model": "best.pt", "task": task}
    (tmp_path / "run" / "args.yaml").write_text(yaml.safe_dump(settings))
    page = run_report(run=str(tmp_path / "run")).read_text()
    folder, plain = Path(load_data(data)["val"]), YOLO(weights / "best.pt")
    count = 0
    for name, article in re.findall(r'<p class="name">(.*?)</p>(.*?)</article>', page, re.DOTALL):
        labels, student, _ = re.findall(r"<figure>(.*?)</figure>", article, re.DOTALL)
        label_file = folder.parent.parent / "labels" / folder.name / Path(name).with_suffix(".txt")
        assert_same(drawn(labels), labelled(label_file, task))
        result = plain.predict(cv2.imread(str(folder / name)), imgsz=SIZE, verbose=False, device="cpu")[0]
        assert_same(drawn(student), detected(result))
        count += len(drawn(student))
    assert count > 10
