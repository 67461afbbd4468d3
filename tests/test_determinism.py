"""The same command gives the same run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from helpers.models import YOLOV8N
from helpers.results import repeatable_rows, states_equal, weights

from yolokd import YoloDistiller


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Let processes compute inside the block, so that everything else takes longer."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_training_is_the_same_again_beside_busy_processes(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    """All settings are the defaults, `teacher_precision=auto` among them."""
    runs = [YoloDistiller(teacher=teacher, student=YOLOV8N) for _ in range(2)]
    keys = {k: v for k, v in tiny.items() if k != "project"} | {"deterministic": True, "probe": 2}
    runs[0].train(**keys, save_dir=str(tmp_path / "first"))
    with busy_processes(2):
        runs[1].train(**keys, save_dir=str(tmp_path / "second"))
    first, second = (run.trainer for run in runs)
    assert repeatable_rows(Path(first.save_dir)) == repeatable_rows(Path(second.save_dir))
    assert states_equal(weights(first), weights(second))
    assert first.model.yolokd == second.model.yolokd
