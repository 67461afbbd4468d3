"""Fixtures that all tests share, and the environment that they run in."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

# Before Ultralytics and torch are imported, which read these once.
os.environ.setdefault("YOLO_AUTOINSTALL", "false")
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    folder = TemporaryDirectory(prefix="yolokd-tests-")  # removed when this process ends
    os.environ["YOLO_CONFIG_DIR"] = folder.name
if hasattr(os, "sched_setaffinity") and (worker := os.environ.get("PYTEST_XDIST_WORKER")):
    cores = sorted(os.sched_getaffinity(0))  # one core for each process, or their threads would wait for each other
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})

from helpers.data import write_dataset
from helpers.models import MODELS, YOLOV8S, random_detector, save_checkpoint
from helpers.runs import TINY
from ultralytics import SETTINGS

if "PYTEST_XDIST_WORKER" not in os.environ:  # loggers are slow to import; test_loggers.py turns on those that it tests
    SETTINGS.update(dict.fromkeys(("clearml", "comet", "dvc", "mlflow", "raytune", "tensorboard", "wandb"), False))


def pytest_collection_finish() -> None:
    """Leave what is imported out of later garbage collections: Ultralytics starts five of them in a training."""
    gc.collect()
    gc.freeze()


collect_ignore = ["helpers"]  # hold no tests, and pytest would run the programs among them when it looks for doctests


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a test's architecture by its file, without the folder."""
    return Path(val).name if isinstance(val, str) and val.startswith(str(MODELS)) else None


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the .yaml of a small data set, with 12 images to train on and 6 to validate with."""
    return str(write_dataset(tmp_path_factory.mktemp("data")))


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the path of a checkpoint of a random yolov8s."""
    return str(save_checkpoint(random_detector(YOLOV8S, seed=1), tmp_path_factory.mktemp("t") / "teacher.pt"))


@pytest.fixture
def tiny(data: str, tmp_path: Path) -> dict[str, Any]:
    """Return the settings of a training that takes seconds, in a folder of its own."""
    return {**TINY, "data": data, "project": str(tmp_path / "runs"), "epochs": 2, "check_teacher": False}
