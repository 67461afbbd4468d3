"""Every Python block of every README runs, as written, on small data."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from shutil import copy

import cv2
import numpy as np
import pytest
from helpers.data import write_dataset
from helpers.models import MODELS, YOLOV8N, random_detector, save_checkpoint

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md", *sorted(ROOT.glob("*/README.md"))]


def python_blocks(file: Path) -> str:
    """Return the lines of a file's Python blocks; all other lines are empty, so that line numbers stay the same."""
    lines, inside = [], False
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


WITH_BLOCKS = [file for file in FILES if python_blocks(file).strip()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make the files that the blocks name: a teacher, a data set, a trained student and an image."""
    write_dataset(tmp_path, train=2, val=1).rename(tmp_path / "coco8.yaml")
    copy(MODELS / "yolov8.yaml", tmp_path)  # small ones, for speed: Ultralytics takes a file of this folder first
    save_checkpoint(random_detector(YOLOV8N, seed=1), tmp_path / "yolov8l.pt")
    save_checkpoint(random_detector(YOLOV8N), tmp_path / "best.pt")
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.full((120, 160, 3), 99, np.uint8))
    return tmp_path


@pytest.mark.parametrize("file", WITH_BLOCKS, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_python_blocks_of_a_readme_run(file: Path, folder: Path) -> None:
    script = folder / "blocks.py"
    script.write_text(python_blocks(file), encoding="utf-8")
    search_path = os.pathsep.join([str(ROOT / "export"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search_path, "CUDA_VISIBLE_DEVICES": "", "YOLO_OFFLINE": "true"}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_readmes_with_python_blocks_are_found() -> None:
    assert {str(file.relative_to(ROOT)) for file in WITH_BLOCKS} >= {"README.md", "cfg/README.md", "export/README.md"}
