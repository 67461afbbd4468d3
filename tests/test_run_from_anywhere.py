"""Runs are repeated and resumed from another folder than they were started in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.models import YOLOV8N
from helpers.runs import TINY, train_and_stop

from yolokd import YoloDistiller
from yolokd.config.parse import merge_cfg_file
from yolokd.training.plan import make_plan
from yolokd.training.resume.hint import resume_hint
from yolokd.training.settings import with_absolute_paths


def test_files_get_absolute_paths_and_other_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt", "d.yaml"):
        Path(name).touch()
    keys = {"teacher": "[a.pt,b.pt]", "model": "yolov8n.yaml", "data": Path("d.yaml"), "pretrained": True, "name": "d"}
    absolute = {"teacher": [str(tmp_path / "a.pt"), str(tmp_path / "b.pt")], "data": str(tmp_path / "d.yaml")}
    assert with_absolute_paths(keys) == keys | absolute
    missing = {"teacher": "yolov8l.pt", "data": "coco8.yaml", "model": None, "pretrained": "no/such.pt"}
    assert with_absolute_paths(missing) == missing


def test_a_run_with_a_relative_teacher_goes_on_from_another_folder(
    data: str, teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, elsewhere = tmp_path / "a start", tmp_path / "elsewhere"
    shutil.copytree(Path(data).parent, start / "data")
    shutil.copy(teacher, start / "t.pt")
    elsewhere.mkdir()
    monkeypatch.chdir(start)
    settings: dict[str, Any] = TINY | {"epochs": 2, "check_teacher": False, "data": "data/data.yaml", "save_dir": "run"}
    distiller = YoloDistiller(teacher="t.pt", student=YOLOV8N, method="fitnet", teacher_precision="fp32")
    train_and_stop(distiller, settings)
    monkeypatch.chdir(elsewhere)
    folder = start / "run"
    assert resume_hint(distiller.trainer) == f"continue with: yolokd train resume='{folder}'"
    saved = torch.load(folder / "weights" / "last.pt", weights_only=False)["train_args"]
    repeated = yaml.safe_load((folder / "distill.yaml").read_text())
    for keys in (saved, repeated):
        assert (keys["teacher"], keys["data"]) == (str(start / "t.pt"), str(start / "data" / "data.yaml"))
    assert make_plan(merge_cfg_file({"cfg": str(folder / "distill.yaml")})).teachers
    resumed = YoloDistiller()
    resumed.train(resume=str(folder))
    assert resumed.trainer.save_dir == folder
    assert resumed.trainer.start_epoch == 1
