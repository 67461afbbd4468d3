"""Models given as objects: trained or taught from as what they are, and named so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import YOLOV8S, random_detector, save_checkpoint
from helpers.runs import train_one_epoch
from ultralytics import YOLO

from yolokd import UserError, YoloDistiller
from yolokd.models import model_objects
from yolokd.models.checkpoint import load_teacher
from yolokd.models.model_objects import as_path, as_paths


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of copies, which each test has for itself."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "yolokd" / "models"


def test_an_object_made_from_a_yaml_is_that_yaml(copies: Path, tiny: dict[str, Any]) -> None:
    distiller = YoloDistiller(student=YOLO("yolov8n.yaml"), method="none")
    assert distiller.keys["student"] == "yolov8n.yaml"
    with pytest.raises(UserError, match=r"teacher=yolov8s.yaml: is not a .pt checkpoint"):
        YoloDistiller(teacher=YOLO("yolov8s.yaml")).train(**tiny)
    assert not copies.exists()


def test_an_object_loaded_from_a_file_is_that_file_until_it_is_changed(copies: Path, tmp_path: Path) -> None:
    file = save_checkpoint(random_detector(), tmp_path / "my teacher.pt")
    model = YOLO(file)
    assert as_paths([model, model.model], "teacher") == [str(file), str(file)]
    assert not copies.exists()
    with torch.no_grad():
        next(model.model.parameters()).add_(1)
    changed = Path(str(as_path(model, "teacher")))
    assert changed.parent == copies
    assert changed.name.startswith("my_teacher-")
    assert torch.equal(next(load_teacher(str(changed), False).parameters()), next(model.model.parameters()))


def test_an_object_whose_file_is_gone_or_replaced_is_copied(copies: Path, tmp_path: Path) -> None:
    file = save_checkpoint(random_detector(), tmp_path / "t.pt")
    model = YOLO(file)
    save_checkpoint(random_detector(seed=9), file)
    assert Path(str(as_path(model, "teacher"))).parent == copies
    file.unlink()
    assert Path(str(as_path(model, "teacher"))).parent == copies
    assert len(list(copies.iterdir())) == 1


def test_a_teacher_that_is_a_module_is_named_by_its_yaml(copies: Path, tiny: dict[str, Any]) -> None:
    teacher = random_detector(YOLOV8S, seed=1)
    folder = train_one_epoch(tiny, teacher)
    (copy,) = copies.iterdir()
    assert copy.name.startswith("yolov8s-")
    provenance = torch.load(folder / "weights" / "last.pt", weights_only=False)["ema"].yolokd
    assert provenance["teacher"]["file"] == copy.name
    written = copy.read_bytes()
    YoloDistiller(teacher=teacher).train(resume=str(folder))
    assert copy.read_bytes() == written


def test_copies_do_not_pile_up(copies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_objects, "MAX_COPIES", 2)
    first, second, third = (torch.nn.Linear(1, 1) for _ in range(3))
    paths = [Path(str(as_path(module, "teacher"))) for module in (first, second, first, third)]
    assert sorted(copies.iterdir()) == sorted(paths[2:])


def test_an_object_that_is_no_model_is_refused() -> None:
    with pytest.raises(UserError, match="teacher=3: is not a model"):
        as_path(3, "teacher")
