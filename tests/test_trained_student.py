"""Students that are trained already and go on, alone and with a teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import YOLOV8N
from helpers.results import saved_weights
from helpers.runs import TINY, train_plainly
from torch import Tensor

from yolokd import YoloDistiller
from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.plan import plan_runs
from yolokd.commands.compare.row import make_row
from yolokd.commands.compare.train_and_score import train_and_score

STILL = {"lr0": 0.0, "warmup_bias_lr": 0.0, "optimizer": "SGD"}  # no weight changes, so that a run shows its start


@pytest.fixture(scope="module", params=["yolokd", pytest.param("ultralytics", marks=pytest.mark.slow)])
def trained(request: pytest.FixtureRequest, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a student, and return its best.pt."""
    keys = {**TINY, "data": data, "project": str(tmp_path_factory.mktemp("trained")), "epochs": 1}
    if request.param == "ultralytics":
        return Path(train_plainly(YOLOV8N, keys).best)
    distiller = YoloDistiller(student=YOLOV8N, method="none")
    distiller.train(**keys)
    return Path(distiller.trainer.best)


def learned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what an optimizer changes, without the statistics of batch norms."""
    return {name: value for name, value in state.items() if "running_" not in name and "num_batches" not in name}


def runs_of(student: Path, data: str, teacher: str, project: Path, **keys: Any) -> list[ComparisonRun]:
    settings = {k: v for k, v in TINY.items() if k in ("imgsz", "batch", "nbs", "report")}
    given = {**settings, "data": data, "epochs": 1, **keys}
    methods = ["none", "native", "fitnet+pdf"]
    return plan_runs(methods, 0, "val", project, {"student": str(student), "teacher": teacher, **given})[0]


@pytest.mark.slow
def test_all_candidates_of_a_comparison_go_on_from_the_same_checkpoint(
    trained: Path, data: str, teacher: str, tmp_path: Path
) -> None:
    start = learned(saved_weights(trained))
    for run in runs_of(trained, data, teacher, tmp_path, **STILL):
        train_and_score(run, "cpu")
        assert make_row(run, images=12).student == (trained.name if run.method != "teacher" else "")
        if run.method != "teacher":
            end = learned(saved_weights(run.weights / "best.pt"))
            assert end.keys() == start.keys()
            assert all(torch.equal(end[name], start[name]) for name in start), run.method


def test_a_trained_student_is_identified_by_its_content(trained: Path, data: str, teacher: str, tmp_path: Path) -> None:
    copy = Path(shutil.copy(trained, tmp_path / "copy.pt"))
    first = [run.hash for run in runs_of(trained, data, teacher, tmp_path)]
    assert [run.hash for run in runs_of(copy, data, teacher, tmp_path)] == first
    content = torch.load(copy, weights_only=False)
    next(content["model"].parameters()).data.add_(1)
    torch.save(content, copy)
    other = [run.hash for run in runs_of(copy, data, teacher, tmp_path)]
    assert other[0] == first[0]  # the teacher's
    assert not set(other[1:]) & set(first[1:])
