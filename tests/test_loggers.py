"""TensorBoard and MLflow, by Ultralytics' own callbacks, in a real training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import YOLOV8N
from helpers.results import rows
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PROGRAM = Path(__file__).parent / "helpers" / "programs" / "logged_training.py"
OURS = ("level/", "clip/", "distill/")


@pytest.fixture(scope="module")
def logged(teacher: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in a process with settings of its own; return a folder: run in `logged`, MLflow's store in `store`."""
    folder = tmp_path_factory.mktemp("loggers")
    (folder / "settings").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # Ultralytics' loggers heed it
    environment |= {"YOLO_CONFIG_DIR": str(folder / "settings"), "MLFLOW_ALLOW_FILE_STORE": "true"}
    environment |= {"MLFLOW_TRACKING_URI": (folder / "store").as_uri()}
    command = [sys.executable, PROGRAM, teacher, YOLOV8N, data, folder]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "model graph visualization added" in done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def columns(logged: Path) -> dict[str, list[float]]:
    """Return yolokd's columns of results.csv."""
    results = rows(logged / "logged")
    assert len(results) == 2
    return {name: [row[name] for row in results] for name in results[0] if name.startswith(OURS)}


def test_results_csv_holds_the_columns_that_loggers_must_get(columns: dict[str, list[float]]) -> None:
    assert {"level/P3/fitnet_ratio", "level/P5/share", "clip/student", "distill/dropped"} <= columns.keys()


def test_a_run_with_a_teacher_reaches_tensorboard(logged: Path, columns: dict[str, list[float]]) -> None:
    events = EventAccumulator(str(logged / "logged"))
    events.Reload()
    for name, values in columns.items():
        by_epoch = {event.step: event.value for event in events.Scalars(name)}
        assert [by_epoch[epoch] for epoch in (1, 2)] == pytest.approx(values, rel=1e-4)


def test_a_run_with_a_teacher_reaches_mlflow(
    logged: Path, columns: dict[str, list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((logged / "store").as_uri())
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.data.params["method"] == "fitnet"
    for name, values in columns.items():
        by_epoch = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert [by_epoch[epoch] for epoch in (0, 1)] == pytest.approx(values, rel=1e-4)
