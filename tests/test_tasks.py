"""Students and teachers of all tasks: segmentation, poses and rotated boxes beside detection."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import cloudpickle
import cv2
import numpy as np
import pytest
import torch
from helpers.device import SCRIPT, detect
from helpers.models import YOLOV8N, calibrate
from helpers.results import repeatable_rows, rows, states_equal, weights
from helpers.runs import TINY, captured_log, distil, train_and_stop, train_plainly
from helpers.tasks import random_model, save_model, write_data, write_model
from ultralytics import YOLO

from yolokd import UserError, YoloDistiller
from yolokd.commands.check import print_check
from yolokd.commands.compare import run_compare
from yolokd.commands.compare.ledger import TEACHER, read
from yolokd.data.dataset import validation_images
from yolokd.exporter.agreement import Thresholds
from yolokd.exporter.export_model import export
from yolokd.exporter.parity import ExportReport, verify
from yolokd.models.checkpoint import load_model
from yolokd.models.tasks import TASKS as TASKS_OF_ULTRALYTICS
from yolokd.training.plan import make_plan
from yolokd.training.settings import training_keys
from yolokd.training.tasks import TRAINERS, SegmentationDistillationTrainer

OWN_LOSSES = {"segment": "seg_loss", "pose": "pose_loss", "obb": "angle_loss"}
FAMILIES = {"segment": "yolo26", "pose": "yolov8", "obb": "yolov8"}  # of the student; one is end-to-end
TASKS = tuple(OWN_LOSSES)
SIZE = 128  # pixels, of exported models


def one_fast(fast: str) -> list[Any]:
    """Return the tasks as parameters of a test that trains: all but one of them are for the slow tests."""
    return [fast, *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS if task != fast)]


class World:
    """A data set, a student and a teacher of a task."""

    def __init__(self, folder: Path, task: str) -> None:
        self.data = write_data(folder, task)
        self.student = write_model(folder, task, FAMILIES[task])
        self.teacher = save_model(folder / f"{task}.pt", random_model(write_model(folder, task, scale="s"), task), task)

    def settings(self, folder: Path, **more: Any) -> dict[str, Any]:
        keys = {"data": self.data, "project": str(folder / "runs"), "epochs": 1, "check_teacher": False}
        return TINY | keys | more


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {task: World(tmp_path_factory.mktemp(task), task) for task in TASKS}


@pytest.mark.parametrize("task", one_fast("pose"))
def test_method_none_equals_plain_training_of_the_task(task: str, worlds: dict[str, World], tmp_path: Path) -> None:
    world = worlds[task]
    settings = world.settings(tmp_path)
    ours = YoloDistiller(student=world.student, method="none")
    ours.train(**settings)
    theirs = train_plainly(world.student, settings)
    assert states_equal(weights(ours.trainer), weights(theirs))
    assert ours.trainer.metrics == theirs.metrics


@pytest.fixture(scope="module")
def distilled(worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], YoloDistiller]:
    """Return a function that trains a student of a task, once, with a teacher that is scored and a method of labels."""

    @cache
    def train(task: str) -> YoloDistiller:
        keys = worlds[task].settings(tmp_path_factory.mktemp("distilled"), check_teacher=True)
        return distil(worlds[task].teacher, worlds[task].student, keys, method="fitnet+fgd")

    return train


@pytest.mark.parametrize("task", one_fast("segment"))
def test_results_csv_holds_the_losses_of_the_task_and_of_the_methods(
    task: str, distilled: Callable[[str], YoloDistiller]
) -> None:
    (row,) = rows(distilled(task).trainer)
    assert all(row[f"train/{name}_loss"] > 0 for name in ("box", "cls", "fitnet", "fgd"))
    assert row[f"train/{OWN_LOSSES[task]}"] > 0
    assert f"val/{OWN_LOSSES[task]}" in row
    assert row["level/P3/fitnet_ratio"] > 0


@pytest.mark.parametrize("task", one_fast("segment"))
def test_checkpoints_are_plain_models_of_the_task(task: str, distilled: Callable[[str], YoloDistiller]) -> None:
    trainer = distilled(task).trainer
    for path in (trainer.best, trainer.last):
        model = YOLO(path)
        assert model.task == task
        assert type(model.model) is TASKS_OF_ULTRALYTICS[task].model
        assert list(model.model._modules) == ["model"]
        assert model.model.yolokd["method"] == "fitnet+fgd"


@pytest.mark.parametrize("task", one_fast("segment"))
def test_the_teacher_is_scored_on_its_task_as_ultralytics_scores_it(
    task: str, distilled: Callable[[str], YoloDistiller], worlds: dict[str, World], tmp_path: Path
) -> None:
    world = worlds[task]
    keys = {"imgsz": 64, "batch": 8, "plots": False, "device": "cpu", "project": str(tmp_path)}
    metrics = YOLO(world.teacher).val(data=world.data, **keys)
    expected = metrics.results_dict[TASKS_OF_ULTRALYTICS[task].score_column("mAP50-95")]
    assert distilled(task).trainer.teacher_score == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("task", one_fast("segment"))
def test_the_model_card_says_what_the_model_finds(task: str, distilled: Callable[[str], YoloDistiller]) -> None:
    trainer = distilled(task).trainer
    card = (trainer.wdir / "MODEL_CARD.md").read_text()
    finds = {"segment": "marks the area", "pose": "marks the keypoints", "obb": "draws a rotated box"}
    assert finds[task] in card
    score = trainer.metrics[TASKS_OF_ULTRALYTICS[task].score_column("mAP50-95")]
    assert f"{score:.3f}".rstrip("0") in card


@pytest.fixture(scope="module")
def exported(worlds: dict[str, World], tmp_path_factory: pytest.TempPathFactory) -> dict[str, ExportReport]:
    """Export a model of each task that detects something in the images."""
    reports = {}
    for task, world in worlds.items():
        folder, images = tmp_path_factory.mktemp("exported"), validation_images(world.data)
        model = calibrate(random_model(write_model(folder, task), task), images, SIZE)
        reports[task] = export(save_model(folder / f"{task}.pt", model, task, data=world.data, imgsz=SIZE))
    return reports


@pytest.mark.parametrize("task", TASKS)
def test_an_export_gives_the_masks_keypoints_and_rotated_boxes_of_the_checkpoint(
    task: str, exported: dict[str, ExportReport]
) -> None:
    report = exported[task]
    assert report.passed
    (row,) = report.rows
    assert row.torch_detections == row.file_detections > 10
    assert row.worst_own > 0.95
    assert task != "obb" or row.worst_own == 1  # rotated boxes are compared by their IoU


@pytest.mark.parametrize("task", ["segment", "pose"])
def test_an_export_with_other_masks_or_keypoints_fails(
    task: str, exported: dict[str, ExportReport], worlds: dict[str, World], tmp_path: Path
) -> None:
    """Of a file whose boxes and scores are right."""
    source = exported[task].path
    model = load_model(source.with_suffix(".pt"), "model")[0]
    with torch.no_grad():
        for layers in model.model[-1].cv4:
            layers[-1].weight.neg_()
            layers[-1].bias.neg_()
    copy = Path(shutil.copy(source, tmp_path))
    report = verify(copy, model, validation_images(worlds[task].data), Thresholds())
    assert not report.passed
    assert report.rows[0].scores < 1e-4
    assert report.rows[0].worst_iou > 0.99
    assert report.rows[0].worst_own < 0.95


@pytest.fixture(scope="module")
def predicted(exported: dict[str, ExportReport], worlds: dict[str, World]) -> dict[str, list[tuple[Any, list[Any]]]]:
    """Return, for each task, Ultralytics' and detect.py's results of each image, scaled to an odd size."""
    found = {}
    for task, report in exported.items():
        detector, model = detect.Detector(report.path), YOLO(report.path, task=task)
        images = [cv2.resize(image, (200, 150)) for image in validation_images(worlds[task].data)]
        settings = {"imgsz": SIZE, "retina_masks": True, "verbose": False, "device": "cpu"}
        found[task] = [(model.predict(image, **settings)[0], detector(image)) for image in images]
    return found


@pytest.mark.parametrize("task", TASKS)
def test_detect_py_finds_what_ultralytics_finds(task: str, predicted: dict[str, list[tuple[Any, list[Any]]]]) -> None:
    assert sum(len(ours) for _, ours in predicted[task]) > 10
    for theirs, ours in predicted[task]:
        if task == "segment":  # Ultralytics leaves out objects whose masks are empty
            scores = theirs.boxes.conf.numpy()
            ours = [d for d in ours if np.abs(scores - d.score).min() < 1e-5 or area(d) > 20]
        boxes = theirs.obb if task == "obb" else theirs.boxes
        assert len(ours) == len(boxes)
        ours = paired(ours, boxes)  # of equal scores, either may come first
        assert [d.class_id for d in ours] == boxes.cls.int().tolist()
        np.testing.assert_allclose([d.score for d in ours], boxes.conf, atol=1e-4)
        if task == "obb":
            np.testing.assert_allclose([d.corners for d in ours], boxes.xyxyxyxy, atol=0.5)
        else:
            np.testing.assert_allclose([d.box for d in ours], boxes.xyxy, atol=0.05)
        if task == "pose":
            np.testing.assert_allclose([d.keypoints for d in ours], theirs.keypoints.data, atol=0.05)
        if task == "segment":
            masks, same = theirs.masks.data.bool().numpy(), np.stack([drawn(found) for found in ours])
            assert (masks & same).sum() > 0.9 * (masks | same).sum()


def paired(ours: list[Any], boxes: Any) -> list[Any]:
    """Return detections in the order of the boxes of Ultralytics that they resemble most."""
    rows = np.array([[*d.box, 100 * d.class_id, 100 * d.score] for d in ours])
    corners = boxes.xyxy.numpy().clip(0, (200, 150, 200, 150))
    others = np.column_stack([corners, 100 * boxes.cls, 100 * boxes.conf])
    order = np.abs(rows[:, None] - others).sum(2).argmin(0)
    assert sorted(order) == list(range(len(ours)))
    return [ours[index] for index in order]


def drawn(found: Any) -> np.ndarray:
    """Return the mask that a detection's polygons enclose."""
    mask = np.zeros((150, 200), np.uint8)
    cv2.fillPoly(mask, [np.array(polygon, np.int32) for polygon in found.polygons], 1)
    return mask > 0


def area(found: Any) -> int:
    return int(drawn(found).sum())


@pytest.mark.parametrize("task", TASKS)
def test_detect_py_draws_and_writes_them_without_torch(
    task: str, exported: dict[str, ExportReport], worlds: dict[str, World], tmp_path: Path
) -> None:
    block = "import sys; sys.modules.update(torch=None, ultralytics=None, yolokd=None); "
    run = f"import runpy; sys.argv[0] = {str(SCRIPT)!r}; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    image = next((Path(worlds[task].data).parent / "images" / "val").iterdir())
    arguments = [exported[task].path, image, "--out", tmp_path / "out", "--json", tmp_path / "found.json"]
    subprocess.run([sys.executable, "-c", block + run, *map(str, arguments)], check=True, capture_output=True)
    (record,) = json.loads((tmp_path / "found.json").read_text())
    key = {"segment": "polygons", "pose": "keypoints", "obb": "corners"}[task]
    assert record["detections"]
    for found in record["detections"]:
        assert set(found) == {"class", "name", "score", "box", key}
    drawn = cv2.imread(str(tmp_path / "out" / image.name))
    assert np.abs(drawn.astype(int) - cv2.imread(str(image))).max() > 50


@pytest.mark.slow
def test_a_resume_is_exact_with_masks_and_unlabelled_images(worlds: dict[str, World], tmp_path: Path) -> None:
    world = worlds["segment"]
    photos = Path(world.data).parent / "images" / "val"
    keys = world.settings(
        tmp_path, teacher=world.teacher, student=world.student, method="fitnet", unlabelled=str(photos)
    )
    keys |= {"epochs": 2, "deterministic": True, "teacher_precision": "fp32", "fraction": 0.5}
    whole = YoloDistiller()
    whole.train(**keys, name="whole")
    stopped = YoloDistiller()
    train_and_stop(stopped, keys | {"name": "stopped"})
    resumed = YoloDistiller()
    resumed.train(resume=str(stopped.trainer.save_dir))
    assert type(resumed.trainer) is SegmentationDistillationTrainer
    assert states_equal(weights(resumed.trainer), weights(whole.trainer))
    assert repeatable_rows(resumed.trainer.save_dir) == repeatable_rows(whole.trainer.save_dir)


def test_a_detector_teaches_poses_also_on_unlabelled_images(worlds: dict[str, World], tmp_path: Path) -> None:
    world = worlds["pose"]
    teacher = save_model(
        tmp_path / "t.pt", random_model(write_model(tmp_path, "detect", scale="s"), "detect"), "detect"
    )
    keys = world.settings(tmp_path, check_teacher=True, unlabelled=str(Path(world.data).parent / "images" / "val"))
    with captured_log() as lines:
        d = distil(teacher, world.student, keys, method="bckd+fitnet")
    assert d.trainer.teacher_score is None
    assert any("of its boxes: it has no keypoints like those of the labels" in line for line in lines)
    (row,) = rows(d.trainer)
    assert all(row[f"train/{name}_loss"] > 0 for name in ("bckd", "fitnet", "pose"))


@pytest.mark.parametrize("method", ["bckd", "crosskd", "ld", "pdf"])
def test_methods_that_compare_upright_boxes_are_refused_for_rotated_ones(method: str, worlds: dict[str, World]) -> None:
    world = worlds["obb"]
    keys = {"teacher": world.teacher, "model": world.student, "data": world.data, "method": method, "device": "cpu"}
    keys |= {"pdf.box": 1.0} if method == "pdf" else {}
    without = {"bckd": "bckd.alpha_2", "crosskd": "crosskd.beta", "pdf": "pdf.box"}.get(method)
    with pytest.raises(UserError, match="compares upright boxes, and those of the teacher are rotated") as error:
        make_plan(keys)
    if without is not None:
        assert f"give {without}=0" in str(error.value)
        make_plan(keys | {without: 0.0})


def test_check_says_what_is_shared_and_what_is_not(
    worlds: dict[str, World], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = save_model(tmp_path / "t.pt", random_model(write_model(tmp_path, "detect"), "detect"), "detect")
    shared = {"device": "cpu", "imgsz": 64, "method": "fitnet"}
    cases = (
        ("segment", detector, "masks, which it does not predict, are learned from the labels alone"),
        (
            "segment",
            worlds["segment"].teacher,
            "masks, although it predicts them, too, are learned from the labels alone",
        ),
        ("obb", detector, "its score will not be comparable with the student's, rotated box mAP50-95"),
    )
    for task, teacher, said in cases:
        world = worlds[task]
        print_check({"teacher": teacher, "student": world.student, "data": world.data, **shared})
        assert said in capsys.readouterr().out
    keys = {"teacher": worlds["pose"].teacher, "student": YOLOV8N, "data": worlds["pose"].data, **shared}
    print_check(keys)
    assert "its keypoints are not used" in capsys.readouterr().out


def test_students_on_data_of_another_task_are_refused(worlds: dict[str, World]) -> None:
    detection = write_data(Path(worlds["obb"].data).parents[1], "detect")
    for task, problem in (("segment", "a segment dataset"), ("obb", "an OBB dataset"), ("pose", "kpt_shape=None")):
        with pytest.raises(UserError, match=problem):
            YoloDistiller(student=worlds[task].student, method="none").train(data=detection, device="cpu")
    with pytest.raises(UserError, match="task=detect: is not that of the student: obb"):
        make_plan({"model": worlds["obb"].student, "data": worlds["obb"].data, "task": "detect", "method": "none"})


def test_the_drawn_data_set_follows_the_students_task(worlds: dict[str, World]) -> None:
    for task, world in worlds.items():
        assert training_keys({"student": world.student})["data"] == TASKS_OF_ULTRALYTICS[task].shapes


@pytest.mark.slow
def test_compare_decides_by_masks_and_shows_boxes_beside_them(worlds: dict[str, World], tmp_path: Path) -> None:
    world = worlds["segment"]
    path = tmp_path / "c" / "compare.csv"
    files = {"teacher": world.teacher, "student": world.student, "data": world.data}
    keys = {"imgsz": 64, "batch": 4, "epochs": 1, "device": "cpu", "project": str(path.parent)}
    run_compare(method="none,native,fitnet", seeds=0, csv=str(path), **files, **keys)
    ledger = read(path).values()
    assert [row.method for row in ledger] == [TEACHER, "none", "native", "fitnet"]
    for row in ledger:
        assert row.metric == "mask"
        assert row.box_map is not None
        assert row.ap_small is None
        assert len(row.epochs) == (row.method != TEACHER)
    table = (path.parent / "compare-summary.md").read_text()
    assert "| mask mAP50-95 (sd) | mask mAP50 |" in table
    assert "| box mAP50-95 |" in table


def test_processes_of_a_launch_find_the_trainer_by_its_name() -> None:
    for trainer in TRAINERS.values():
        pickled = cloudpickle.dumps(trainer)
        assert pickle.loads(pickled) is trainer
        assert len(pickled) < 200  # a class that is pickled by its content takes more


IMAGE_SETTINGS = {
    "segment": {"single_cls": True, "multi_scale": 0.25},
    "pose": {"rect": True, "classes": [0, 1, 2]},
    "obb": {"single_cls": True, "multi_scale": 0.25, "classes": [0, 1, 2]},
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_settings_of_images_and_classes_work_with_every_task(
    task: str, worlds: dict[str, World], tmp_path: Path
) -> None:
    world = worlds[task]
    keys = world.settings(tmp_path, check_teacher=True, **IMAGE_SETTINGS[task])
    d = distil(world.teacher, world.student, keys, method="fitnet")
    assert rows(d.trainer)[0]["train/fitnet_loss"] > 0
