"""The number of threads on CPUs: the user's, or all cores."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yolokd.runtime.users_threads import OMP, OURS, omp_text_of_user, set_threads

YOLOKD, ULTRALYTICS = "from yolokd import YoloDistiller", "from ultralytics import YOLO"
PRINT = "from yolokd.runtime.threads import training_threads\nprint(training_threads())"


def threads_in_a_process(code: str, environment: dict[str, str], folder: Path) -> int:
    """Return the number that code prints in a new process, whose environment has nothing but these of our variables."""
    rest = {k: v for k, v in os.environ.items() if k not in {OMP, OURS, "TORCHELASTIC_RUN_ID"}}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=rest | environment, cwd=folder, check=True)
    return int(done.stdout)


@pytest.mark.parametrize("first", [YOLOKD, ULTRALYTICS])
def test_trainings_use_all_cores_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    """Ultralytics sets OMP_NUM_THREADS=1 on import, and torch obeys it if it is imported later."""
    assert threads_in_a_process(f"{first}\n{PRINT}", {}, tmp_path) == min(8, len(os.sched_getaffinity(0)))


def test_trainings_use_as_many_threads_as_the_user_has_set_also_in_processes_that_they_start(tmp_path: Path) -> None:
    child = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {PRINT!r}])"
    assert threads_in_a_process(f"{YOLOKD}\n{child}", {OMP: "3"}, tmp_path) == 3


@pytest.mark.parametrize(
    ("environment", "ultralytics_is_imported", "threads"),
    [
        ({}, False, ""),
        ({OMP: "1"}, False, "1"),
        ({OMP: "4"}, True, "4"),
        ({OMP: "1"}, True, ""),  # may be of Ultralytics
        ({OMP: "1", OURS: ""}, False, ""),  # in a process of ours: of Ultralytics
        ({OMP: "1", OURS: "1"}, True, "1"),
        ({OMP: "1", "TORCHELASTIC_RUN_ID": "7"}, False, ""),  # may be of torchrun
        ({OMP: "2", "TORCHELASTIC_RUN_ID": "7"}, False, "2"),
        ({OMP: "1", OURS: "1", "TORCHELASTIC_RUN_ID": "7"}, False, "1"),  # torchrun of a process of ours
        ({OMP: "2", OURS: ""}, False, "2"),  # the user started another process with it
    ],
)
def test_a_1_of_ultralytics_or_torchrun_is_not_the_users(
    environment: dict[str, str], ultralytics_is_imported: bool, threads: str
) -> None:
    assert omp_text_of_user(environment, ultralytics_is_imported) == threads


def test_threads_that_a_command_sets_count_as_the_users_in_processes_that_it_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable in (OMP, OURS):
        monkeypatch.setenv(variable, "")
    set_threads(1)
    assert omp_text_of_user(os.environ) == "1"
