"""The teacher's score before a training; how much its predictions and a student's disagree."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers.data import write_dataset
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, calibrated_detector, label_with, random_detector, save_checkpoint
from helpers.results import rows
from helpers.runs import TINY, captured_log
from ultralytics import YOLO

from yolokd import YoloDistiller
from yolokd.models.disagreement import mean_disagreement
from yolokd.models.evaluate import aligned_copy
from yolokd.training.plan import make_plan
from yolokd.training.teachers import score_teachers


def test_the_teacher_is_scored_on_the_classes_that_are_trained(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d")
    images = [cv2.imread(str(path)) for path in sorted((data.parent / "images" / "val").glob("*.jpg"))]
    teacher = tmp_path / "t.pt"
    label_with(calibrated_detector(YOLOV8S, images, 192), data, 192, teacher)
    common = {"data": str(data), "imgsz": 192, "device": "cpu", "workers": 0}
    scores = []
    for chosen in ({"classes": [0]}, {"classes": [1]}, {"classes": [1], "iou": 0.1}):
        plan = make_plan(common | {"teacher": str(teacher), "model": YOLOV8N, **chosen})
        scores.append(score_teachers(plan, plan.args, torch.device("cpu"), batch=3, save_dir=tmp_path))
        val = YOLO(teacher).val(**common, **chosen, batch=6, plots=False, project=str(tmp_path))
        assert scores[-1] == pytest.approx(val.box.map, abs=1e-3)  # one of them is fused
    assert min(abs(scores[0] - scores[1]), abs(scores[1] - scores[2])) > 1e-2
    assert min(scores) > 0


def test_an_end_to_end_teacher_without_its_one_to_many_branch_keeps_its_own_boxes() -> None:
    fused = random_detector(YOLO26N).eval()
    fused.end2end = True
    fused.fuse(verbose=False)
    assert fused.model[-1].cv2 is None
    image, swapped = torch.rand(1, 3, 64, 64), {0: (1,), 1: (0,)}
    with torch.no_grad():
        own, aligned = fused(image)[0], aligned_copy(fused, fused.names, swapped)(image)[0]
    assert own.shape[-1] == 6
    assert torch.equal(aligned[..., :5], own[..., :5])
    assert torch.equal(aligned[..., 5], 1 - own[..., 5])


def test_a_teacher_whose_score_needs_too_much_memory_is_not_scored_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    data = write_dataset(tmp_path / "d")
    teacher = save_checkpoint(random_detector(YOLOV8S), tmp_path / "t.pt")
    monkeypatch.setattr("yolokd.models.evaluate.score", run_out)
    with captured_log() as lines:
        d = YoloDistiller(teacher=str(teacher), student=YOLOV8N)
        d.train(**TINY, data=str(data), epochs=1, val=False, project=str(tmp_path))
    assert any("memory does not suffice to measure its score; check_teacher=False" in line for line in lines)
    assert len(rows(d.trainer)) == 1


@pytest.fixture
def squares(tmp_path: Path) -> Path:
    """Return the .yaml of a data set of five square images, which a validation neither resizes nor pads."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(5):
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path = tmp_path / "d.yaml"
    path.write_text(yaml.safe_dump({"train": "images", "val": "images", "names": ["disc", "box"]}))
    return path


def undecided(cfg: str, names: dict[int, str], seed: int) -> torch.nn.Module:
    """Return a random detector whose scores vary about 0.5; those of others are near 0."""
    model = random_detector(cfg, names, seed)
    head = model.model[-1]
    with torch.no_grad():
        for branch in (head.cv3, getattr(head, "one2one_cv3", None) or ()):
            for level in branch:
                level[-1].bias.zero_()
                level[-1].weight.mul_(20)
    return model


def probabilities(model: torch.nn.Module, images: Path) -> np.ndarray:
    """Return a model's class probabilities at all positions of all images, (positions, classes), image by image."""
    rows = []
    for file in sorted(images.iterdir()):
        image = torch.from_numpy(cv2.imread(str(file))[..., ::-1].transpose(2, 0, 1).copy())[None].float() / 255
        with torch.no_grad():
            raw = model(image)[1]
        logits = raw.get("one2many", raw)["scores"][0].double().numpy()
        rows.append(1 / (1 + np.exp(-logits.T)))
    return np.concatenate(rows)


@pytest.mark.parametrize("student_cfg", [YOLOV8N, YOLO26N])
def test_d_pred_is_the_mean_squared_difference_of_the_shared_classes_over_all_positions(
    student_cfg: str, squares: Path, tmp_path: Path
) -> None:
    teacher = undecided(YOLOV8S, {0: "Box", 1: "person", 2: "disc"}, seed=1)
    student = undecided(student_cfg, {0: "disc", 1: "box"}, seed=2)
    p_t, p_s = (probabilities(model, squares.parent / "images") for model in (teacher, student))
    expected = np.mean([((p_t[i, 2] - p_s[i, 0]) ** 2 + (p_t[i, 0] - p_s[i, 1]) ** 2) for i in range(len(p_t))])
    settings = {"data": str(squares), "imgsz": 64, "batch": 2, "device": "cpu", "split": "val", "rect": False}
    before = torch.get_rng_state()
    found = mean_disagreement(teacher, student, settings, tmp_path)
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected > 0.01
    assert torch.equal(torch.get_rng_state(), before)
    assert mean_disagreement(teacher, random_detector(YOLOV8N, {0: "cat"}), settings, tmp_path) is None


def test_a_model_does_not_disagree_with_itself(squares: Path, tmp_path: Path) -> None:
    model = random_detector(YOLOV8N)
    settings = {"data": str(squares), "imgsz": 64, "batch": 5, "device": "cpu"}
    assert mean_disagreement(model, model, settings, tmp_path) == 0
