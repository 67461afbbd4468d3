"""The demo, run as a new user runs it: in a process of its own, in an empty folder, without downloads."""

from __future__ import annotations

import re
import time
from pathlib import Path

import cv2
import pytest
from helpers.cli import run_yolokd


def output_of(folder: Path, *arguments: str) -> str:
    done = run_yolokd(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def scores(output: str) -> dict[str, float]:
    """Return the scores in the demo's table by the model's name."""
    lines = re.findall(r"│ (\S+) +│ \d+ +│ \d+ +│ (\d\.\d+) +│", output)
    return {name: float(score) for name, score in lines}


def test_the_short_demo_trains_compares_exports_and_draws(tmp_path: Path) -> None:
    output = output_of(tmp_path, "demo", "short=True", "seed=1")
    assert scores(output).keys() == {"teacher", "student-alone", "student-distilled"}
    assert "pass" in output
    assert "FAIL" not in output
    plots = output[output.index("images to open:") :].split()[3:]
    assert len(plots) == 5
    assert all(cv2.imread(file) is not None for file in plots)
    weights = tmp_path / "runs/distill/demo/student-distilled/weights"
    assert (weights / "best.onnx").is_file()
    assert "mAP50-95" in output_of(
        tmp_path, "val", f"model={weights / 'best.pt'}", "data=shapes", "imgsz=64", "device=cpu"
    )


@pytest.mark.slow
def test_the_demos_teacher_is_clearly_better_than_the_student(tmp_path: Path) -> None:
    """The embedded data set is made so that this holds. The demo takes ten minutes on two idle cores."""
    started = time.time()
    by_model = scores(output_of(tmp_path, "demo"))
    assert by_model["teacher"] >= 0.4
    assert by_model["teacher"] - by_model["student-alone"] >= 0.05
    print(f"{time.time() - started:.0f} s: {by_model}")
