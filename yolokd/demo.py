"""`yolokd demo`: the whole story on the embedded data set, on CPUs, with no network."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars
from rich.console import Console
from rich.table import Table

from yolokd import shapes
from yolokd.config import nearest
from yolokd.distiller import YoloDistiller
from yolokd.errors import UserError
from yolokd.resources import shipped

CONSOLE = Console()
COMMON = {"imgsz": 128, "batch": 16, "nbs": 16, "plots": False, "verbose": False, "cache": True}


@dataclass(frozen=True)
class Recipe:
    """What the demo trains: models of Ultralytics' own and their epochs; ours, found by trial on two cores."""

    teacher: str = "yolov8s.yaml"
    student: str = "yolov8n.yaml"
    teacher_epochs: int = 25
    student_epochs: int = 14
    counts: Mapping[str, int] = field(default_factory=lambda: shapes.COUNTS)


SHORT = Recipe("yolov8n.yaml", "yolov8n.yaml", 1, 1, {"train": 32, "val": 16, "test": 4})


@dataclass
class Run:
    """One finished training of the demo."""

    name: str
    seed: int
    epochs: int
    trained: YoloDistiller
    seconds: float

    @property
    def folder(self) -> Path:
        """Where the run lies."""
        assert self.trained.trainer is not None
        return Path(self.trained.trainer.save_dir)

    @property
    def curve(self) -> list[float]:
        """Validation mAP50-95 by epoch."""
        return polars.read_csv(self.folder / "results.csv")["metrics/mAP50-95(B)"].to_list()

    @property
    def score(self) -> float:
        """mAP50-95 of the best checkpoint on the validation set."""
        return float(self.trained.model.ckpt["train_metrics"]["metrics/mAP50-95(B)"])


def run_demo(short: bool = False, seed: int = 0, method: str = "dfd+pdf", **unknown: Any) -> None:
    """Train teacher, student alone and student distilled; score, export, check and detect.

    `short=True` goes through the same motions on a few pictures, for tests of an installation.
    Raises UserError for unknown keys and methods.
    """
    for key in unknown:
        raise UserError(key, "unknown key", nearest(key, ("short", "seed", "method")) or "short, seed or method")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed={seed}", "must be a whole number of at least 0", "for example seed=0")
    recipe = SHORT if short else Recipe()
    started = time.time()
    data = str(shapes.ensure(counts=recipe.counts))
    project = str(Path("runs/distill/demo").absolute())

    def train(name: str, epochs: int, **keys: Any) -> Run:
        CONSOLE.rule(f"{name}: {epochs} epochs, seed {seed}")
        begun = time.time()
        distiller = YoloDistiller(**keys)
        distiller.train(data=data, epochs=epochs, seed=seed, project=project, name=name, **COMMON)
        return Run(name, seed, epochs, distiller, time.time() - begun)

    teacher = train("teacher", recipe.teacher_epochs, student=recipe.teacher, method="none")
    alone = train("student-alone", recipe.student_epochs, student=recipe.student, method="none")
    distilled = train("student-distilled", recipe.student_epochs, student=recipe.student, method=method,
                      teacher=str(teacher.folder / "weights" / "best.pt"))  # fmt: skip
    CONSOLE.rule("export and detection")
    onnx = distilled.trained.export(imgsz=COMMON["imgsz"], dynamic=True)
    pictures = _detect(onnx, Path(data).parent / "images" / "test", distilled.folder / "detections")
    chart = draw_curves([teacher, alone, distilled], distilled.folder / "demo.png")
    CONSOLE.print(_scores([teacher, alone, distilled]))
    CONSOLE.print(_verdict(teacher.score, alone.score, distilled.score))
    CONSOLE.print(
        f"{time.time() - started:.0f} s in all; the distilled model: {distilled.folder / 'weights/best.pt'}, {onnx}"
    )
    CONSOLE.print("pictures to open:", chart, *pictures, sep="\n  ")


def _detect(onnx: Path, images: Path, out: Path) -> list[Path]:
    """Run the torch-free detector, as a device would, on a few pictures."""
    few = out / "input"
    few.mkdir(parents=True, exist_ok=True)
    for image in sorted(images.glob("*.jpg"))[:4]:
        (few / image.name).write_bytes(image.read_bytes())
    command = [sys.executable, str(shipped("export") / "detect.py"), str(onnx), str(few), "--out", str(out),
               "--json", str(out / "detections.json")]  # fmt: skip
    subprocess.run(command, check=True)
    return sorted(out.glob("*.jpg"))


def draw_curves(runs: list[Run], path: Path) -> Path:
    """Validation mAP over epochs of each run, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        axes.plot(range(1, len(run.curve) + 1), run.curve, marker=".", label=f"{run.name}: {run.score:.3f}")
    axes.set(xlabel="epoch", ylabel="mAP50-95 (validation)", title="yolokd demo, embedded data set")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    return path


def _scores(runs: list[Run]) -> Table:
    table = Table("run", "epochs", "seed", "mAP50-95", "seconds", title="validation scores")
    for run in runs:
        table.add_row(run.name, str(run.epochs), str(run.seed), f"{run.score:.3f}", f"{run.seconds:.0f}")
    return table


def _verdict(teacher: float, alone: float, distilled: float) -> str:
    """One seed proves nothing, and the text says so."""
    return (
        f"distilled - alone: {distilled - alone:+.3f} of a gap of {teacher - alone:.3f} to the teacher; "
        "one seed each, so this shows how it works, not how much it helps"
    )
