"""The demo, run as a new user runs it: in a process of its own, in an empty folder, without downloads."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
from helpers.cli import run_yolokd

from yolokd.commands.demo import PLOT, demo_folder


def output_of(folder: Path, *arguments: str) -> str:
    done = run_yolokd(*arguments, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def scores(output: str) -> dict[str, float]:
    """Return the scores in the demo's table by the model's name."""
    lines = re.findall(r"│ (\S+) +│ \d+ +│ \d+ +│ (\d\.\d+) +│", output)
    return {name: float(score) for name, score in lines}


def interrupt_after_the_teacher(folder: Path, *arguments: str) -> str:
    """Start a demo, interrupt it as Ctrl-C does when its teacher is trained, and return its last line."""
    command = [sys.executable, "-m", "yolokd", *arguments]
    environment = os.environ | {"XDG_DATA_HOME": str(folder / "share")}
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background processes ignore it
    ) as demo:  # fmt: skip
        deadline = time.monotonic() + 200
        while not (folder / "runs/distill/demo/student-alone").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        demo.send_signal(signal.SIGINT)
        _, errors = demo.communicate(timeout=200)
    assert demo.returncode == 128 + signal.SIGINT
    return errors.decode().splitlines()[-1]


@pytest.mark.slow  # .ci/run runs the short demo itself
def test_the_short_demo_trains_compares_exports_and_draws_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    demo = ("demo", "short=True", "seed=1")
    last_line = interrupt_after_the_teacher(tmp_path, *demo)
    assert last_line.endswith("to continue: yolokd demo short=True seed=1 method=fitnet+pdf")
    teacher = tmp_path / "runs/distill/demo/teacher/weights/best.pt"
    trained = teacher.stat().st_mtime_ns
    output = output_of(tmp_path, *demo)
    assert teacher.stat().st_mtime_ns == trained
    assert output.startswith("the demo continues in runs/distill/demo")
    assert [path.name for path in (tmp_path / "runs/distill").iterdir()] == ["demo"]
    assert scores(output).keys() == {"teacher", "student-alone", "student-distilled"}
    assert "pass" in output
    assert "FAIL" not in output
    images, _, report = output.partition("the report, to open in a browser:")
    assert Path(report.strip()) == tmp_path / "runs/distill/demo/student-distilled/report.html"
    assert Path(report.strip()).is_file()
    plots = images[images.index("images to open:") :].split()[3:]
    assert len(plots) == 5
    assert all(cv2.imread(file) is not None for file in plots)
    weights = tmp_path / "runs/distill/demo/student-distilled/weights"
    assert (weights / "best.onnx").is_file()
    assert "mAP50-95" in output_of(
        tmp_path, "val", f"model={weights / 'best.pt'}", "data=shapes", "imgsz=64", "device=cpu"
    )


def test_only_an_unfinished_demo_with_the_same_keys_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = {"short": True, "seed": 0, "method": "fitnet+pdf"}
    folder = demo_folder(keys)
    assert folder == tmp_path / "runs/distill/demo"
    assert demo_folder(keys) == folder
    other = demo_folder(keys | {"seed": 1})
    assert other != folder
    (folder / PLOT).touch()
    assert demo_folder(keys) not in (folder, other)


@pytest.mark.slow
def test_the_demos_teacher_is_clearly_better_than_the_student(tmp_path: Path) -> None:
    """The embedded data set is made so that this holds. The demo takes ten minutes on two idle cores."""
    started = time.time()
    by_model = scores(output_of(tmp_path, "demo"))
    assert by_model["teacher"] >= 0.4
    assert by_model["teacher"] - by_model["student-alone"] >= 0.05
    print(f"{time.time() - started:.0f} s: {by_model}")
