"""Over two hundred epochs, memory, hooks, file handles, threads and processes do not grow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import yaml
from helpers.models import random_detector, save_checkpoint
from ultralytics.utils import ROOT

from yolokd.data.shapes import CLASSES

EPOCHS, WARM = 200, 40
# It runs in a process of its own, or what other tests leave in memory would be counted.
SCRIPT = """
import gc, json, sys
import psutil, torch
from yolokd import YoloDistiller

process, seen = psutil.Process(), []

def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)

def look(trainer):
    gc.collect()
    seen.append({
        "memory": process.memory_info().rss, "handles": process.num_fds(), "threads": process.num_threads(),
        "processes": len(process.children(recursive=True)), "hooks": hooks(trainer.model),
        "tensors": sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),
    })

distiller = YoloDistiller()
distiller.add_callback("on_fit_epoch_end", look)
distiller.train(**json.loads(sys.argv[1]))
print("SEEN", json.dumps(seen))
"""


def tiny_model(scale: float, path: Path) -> Path:
    """Write a model yaml of YOLOv8 with a fraction of the nano's channels."""
    card = yaml.safe_load((ROOT / "cfg" / "models" / "v8" / "yolov8.yaml").read_text())
    path.write_text(yaml.safe_dump(card | {"nc": len(CLASSES), "scales": {"n": [0.33, scale, 1024]}}))
    return path


@pytest.mark.slow
def test_two_hundred_epochs_do_not_use_up_memory_handles_or_threads(tmp_path: Path) -> None:
    larger = random_detector(str(tiny_model(0.125, tmp_path / "yolov8n-large.yaml")), names=dict(enumerate(CLASSES)))
    teacher = save_checkpoint(larger, tmp_path / "teacher.pt")
    keys = {
        "teacher": str(teacher), "student": str(tiny_model(0.0625, tmp_path / "yolov8n-tiny.yaml")), "data": "shapes",
        "method": "dfd+pdf+fgd+mgd", "balance": 1.0, "epochs": EPOCHS, "patience": EPOCHS, "imgsz": 64, "batch": 16,
        "fraction": 0.1, "teacher_precision": "fp32", "save_dir": str(tmp_path / "run"),
        "check_teacher": False, "report": False, "plots": False, "verbose": False, "device": "cpu",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(keys)], capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("SEEN")).removeprefix("SEEN"))
    assert len(seen) == EPOCHS + 1  # one more for the final evaluation
    early, late = seen[WARM : WARM + 20], seen[EPOCHS - 20 : EPOCHS]
    for what in ("handles", "threads", "processes", "hooks", "tensors"):
        assert max(s[what] for s in late) <= max(s[what] for s in early), what
    growth = median(s["memory"] for s in late) / median(s["memory"] for s in early) - 1
    print(f"memory grew by {growth:.2%}")
    assert growth < 0.02
