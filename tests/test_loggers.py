"""TensorBoard, MLflow and Weights & Biases, by Ultralytics' own callbacks, in a real training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.models import YOLOV8N
from helpers.results import rows
from helpers.wandb_file import records
from mlflow.tracking import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from yolokd.runtime.files import sha256

PROGRAM = Path(__file__).parent / "helpers" / "programs" / "logged_training.py"
OURS = ("train/fitnet_", "level/", "clip/", "distill/")


def environment_of_loggers(settings: Path, store: Path) -> dict[str, str]:
    """Return the environment of a process with Ultralytics settings of its own, in which MLflow is on.

    settings, store: the folders of the settings, and of MLflow's runs.
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}  # Ultralytics' loggers heed it
    own = {"YOLO_CONFIG_DIR": str(settings), "MLFLOW_TRACKING_URI": store.as_uri(), "MLFLOW_ALLOW_FILE_STORE": "true"}
    return environment | own


@pytest.fixture(scope="module")
def logged(teacher: str, data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in a process with settings of its own; return a folder: run in `logged`, MLflow's store in `store`."""
    folder = tmp_path_factory.mktemp("loggers")
    (folder / "settings").mkdir()
    environment = environment_of_loggers(folder / "settings", folder / "store")
    environment |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
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
    measurements = {"level/P3/fitnet_gain", "level/P3/fitnet_ratio", "level/P5/share"}
    assert {"train/fitnet_loss", *measurements, "clip/student", "distill/dropped"} <= columns.keys()


def test_a_run_with_a_teacher_reaches_tensorboard(logged: Path, columns: dict[str, list[float]], teacher: str) -> None:
    events = EventAccumulator(str(logged / "logged"))
    events.Reload()
    for name, values in columns.items():
        by_epoch = {event.step: event.value for event in events.Scalars(name)}
        assert [by_epoch[epoch] for epoch in (1, 2)] == pytest.approx(values, rel=1e-4)
    session = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    parameters = HParamsPluginData.FromString(session).session_start_info.hparams
    assert parameters["yolokd.teacher.file"].string_value == "teacher.pt"
    assert parameters["yolokd.teacher.sha256"].string_value == sha256(teacher)
    assert parameters["yolokd.level_floor"].number_value == 0.1
    assert parameters["yolokd.method"].string_value == "fitnet"


def test_a_run_with_a_teacher_reaches_mlflow(
    logged: Path, columns: dict[str, list[float]], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient((logged / "store").as_uri())
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    settings = {"method": "fitnet", "level_floor": "0.1", "teacher": teacher, "yolokd.teacher.sha256": sha256(teacher)}
    assert {key: run.data.params.get(key) for key in settings} == settings
    for name, values in columns.items():
        by_epoch = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert [by_epoch[epoch] for epoch in (0, 1)] == pytest.approx(values, rel=1e-4)


def test_a_run_with_a_teacher_reaches_weights_and_biases(
    logged: Path, columns: dict[str, list[float]], teacher: str
) -> None:
    (path,) = (logged / "logged" / "wandb").glob("offline-run-*/run-*.wandb")
    parameters, history = {}, []
    for record in records(path):
        parameters |= {item.key: json.loads(item.value_json) for item in record.config.update}
        parameters |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        step = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        history += [step] if step else []
    settings = {"method": "fitnet", "level_floor": 0.1, "yolokd.teacher.sha256": sha256(teacher)}
    assert {key: parameters.get(key) for key in settings} == settings
    for name, values in columns.items():
        by_epoch = {step["epoch"]: step[name] for step in history if name in step}
        assert [by_epoch[epoch] for epoch in (1, 2)] == pytest.approx(values, rel=1e-4)


def test_a_benchmark_is_logged_nowhere(data: str, tmp_path: Path) -> None:
    environment = environment_of_loggers(tmp_path, tmp_path / "store")
    keys = f"teacher={YOLOV8N} student={YOLOV8N} data={data} imgsz=32 batch=2 rounds=1 method=none device=cpu"
    command = [sys.executable, "-m", "yolokd", "bench", *keys.split(), f"project={tmp_path / 'bench'}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MLflow" not in done.stdout + done.stderr
    assert not (tmp_path / "store").exists()
