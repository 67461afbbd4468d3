"""The demo, as a new user runs it: a subprocess in an empty folder, with no downloads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest


def yolokd(folder: Path, *words: str) -> str:
    environment = os.environ | {"XDG_DATA_HOME": str(folder / "share"), "YOLO_AUTOINSTALL": "false"}
    command = [sys.executable, "-m", "yolokd.cli", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def scores(output: str) -> dict[str, float]:
    rows = re.findall(r"│ (\S+) +│ \d+ +│ \d+ +│ (\d\.\d+) +│", output)
    return {name: float(score) for name, score in rows}


def test_the_short_demo_goes_through_the_whole_story(tmp_path: Path) -> None:
    output = yolokd(tmp_path, "demo", "short=True", "seed=1")
    assert scores(output).keys() == {"teacher", "student-alone", "student-distilled"}
    assert "pass" in output
    assert "FAIL" not in output
    named = output[output.index("pictures to open:") :].split()[3:]
    assert len(named) == 5
    assert all(cv2.imread(picture) is not None for picture in named)
    weights = tmp_path / "runs/distill/demo/student-distilled/weights"
    assert (weights / "best.onnx").is_file()
    assert "mAP50-95" in yolokd(tmp_path, "val", f"model={weights / 'best.pt'}", "data=shapes", "imgsz=64")


@pytest.mark.slow
def test_the_demos_teacher_is_worth_distilling(tmp_path: Path) -> None:
    """The promise of the embedded data set; the ten minutes are those of two idle cores."""
    started = time.time()
    found = scores(yolokd(tmp_path, "demo"))
    assert found["teacher"] >= 0.4
    assert found["teacher"] - found["student-alone"] >= 0.05
    print(f"{time.time() - started:.0f} s: {found}")
