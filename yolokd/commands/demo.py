"""`yolokd demo`: the whole story on the embedded data set, on CPUs, with no network."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars
from rich.table import Table
from ultralytics.utils.files import increment_path

from yolokd.config.arguments import did_you_mean
from yolokd.config.parse import method_names
from yolokd.data import shapes
from yolokd.distiller import HOME, YoloDistiller
from yolokd.errors import UserError
from yolokd.runtime.console import CONSOLE
from yolokd.runtime.resources import bundled_folder

# Ours, found by trial on the embedded data set: so few steps want AdamW and mild augmentation.
SETTINGS: Mapping[str, Any] = {
    "imgsz": 128, "batch": 16, "nbs": 16, "optimizer": "AdamW", "momentum": 0.9, "warmup_bias_lr": 0.0,
    "mosaic": 0.0, "close_mosaic": 0, "scale": 0.1, "translate": 0.05, "hsv_s": 0.2, "hsv_v": 0.2, "amp": False,
    "channels_last": True, "cache": "ram", "plots": False, "verbose": False, "device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One model of Ultralytics', with its epochs and learning rate."""

    model: str
    epochs: int
    lr0: float


@dataclass(frozen=True)
class Recipe:
    """What the demo trains; found by trial, as SETTINGS. The student alone and distilled share one recipe."""

    teacher: Training = Training("yolov8s.yaml", epochs=25, lr0=0.0015)
    student: Training = Training("yolov8n.yaml", epochs=14, lr0=0.002)
    counts: Mapping[str, int] = field(default_factory=lambda: shapes.COUNTS)


SHORT = Recipe(
    Training("yolov8n.yaml", 1, 0.002), Training("yolov8n.yaml", 1, 0.002), {"train": 32, "val": 16, "test": 4}
)


@dataclass
class DemoRun:
    """One finished training of the demo."""

    name: str
    epochs: int
    trained: YoloDistiller
    seconds: float

    @property
    def weights(self) -> Path:
        """Where best.pt and its exports lie."""
        return Path(str(self.trained.model.ckpt_path)).parent

    @property
    def curve(self) -> list[float]:
        """Validation mAP50-95 by epoch."""
        table = polars.read_csv(self.weights.parent / "results.csv")
        return [float(v) for v in table["metrics/mAP50-95(B)"]]

    @property
    def score(self) -> float:
        """mAP50-95 of best.pt on the validation set."""
        return max(self.curve)


def run_demo(short: bool = False, seed: int = 0, method: str = "dfd", **unknown: Any) -> None:
    """Train teacher, student alone and student distilled; score, export, check and detect.

    `short=True` goes through the same motions on a few pictures, to try an installation.
    Raises UserError for unknown keys, methods and seeds, and RuntimeError where the export fails its check.
    """
    for key in unknown:
        raise UserError(key, "unknown key", did_you_mean(key, ("short", "seed", "method")) or "short, seed or method")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(f"seed={seed}", "must be a whole number of at least 0", "for example seed=0")
    if not method_names(method):
        raise UserError("method=none", "leaves nothing to show", "for example method=dfd")
    started = time.time()
    recipe = SHORT if short else Recipe()
    data = shapes.ensure(counts=recipe.counts)
    runs = _train_all(recipe, str(data), seed, method)
    distilled = runs[-1]
    CONSOLE.rule("export and detection")
    onnx = distilled.trained.export(imgsz=SETTINGS["imgsz"], dynamic=True)
    pictures = _detect(onnx, data.parent / "images" / "test", distilled.weights.parent / "detections")
    chart = draw_curves(runs, distilled.weights.parent / "demo.png")
    CONSOLE.print(_scores(runs, seed))
    CONSOLE.print(_verdict(*(run.score for run in runs)))
    CONSOLE.print(f"{time.time() - started:.0f} s in all")
    CONSOLE.print("the distilled model:", distilled.weights / "best.pt", onnx, sep="\n  ")
    CONSOLE.print("pictures to open:", chart, *pictures, sep="\n  ")


def _train_all(recipe: Recipe, data: str, seed: int, method: str) -> list[DemoRun]:
    """Teacher, student alone, student distilled."""
    home = (HOME / "demo").absolute()

    def train(name: str, training: Training, **keys: Any) -> DemoRun:
        CONSOLE.rule(f"{name}: {training.model}, {training.epochs} epochs, seed {seed}")
        begun = time.time()
        distiller = YoloDistiller(student=training.model, **keys)
        own = {"data": data, "save_dir": str(increment_path(home / name)), "seed": seed}
        distiller.train(**SETTINGS, **own, epochs=training.epochs, lr0=training.lr0)
        return DemoRun(name, training.epochs, distiller, time.time() - begun)

    teacher = train("teacher", recipe.teacher, method="none")
    alone = train("student-alone", recipe.student, method="none")
    distilled = train("student-distilled", recipe.student, method=method, teacher=teacher.weights / "best.pt")
    return [teacher, alone, distilled]


def _detect(onnx: Path, images: Path, out: Path) -> list[Path]:
    """DemoRun the torch-free detector, as a device would, on a few pictures."""
    few = out / "input"
    few.mkdir(parents=True, exist_ok=True)
    for image in sorted(images.glob("*.jpg"))[:4]:
        (few / image.name).write_bytes(image.read_bytes())
    script, record = bundled_folder("export") / "detect.py", out / "detections.json"
    subprocess.run([sys.executable, script, onnx, few, "--out", out, "--json", record], check=True)
    return sorted(out.glob("*.jpg"))


def draw_curves(runs: Sequence[DemoRun], path: Path) -> Path:
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


def _scores(runs: Sequence[DemoRun], seed: int) -> Table:
    table = Table("run", "epochs", "seed", "mAP50-95", "seconds", title="validation scores")
    for run in runs:
        table.add_row(run.name, str(run.epochs), str(seed), f"{run.score:.3f}", f"{run.seconds:.0f}")
    return table


def _verdict(teacher: float, alone: float, distilled: float) -> str:
    return (
        f"distilled - alone: {distilled - alone:+.3f} of a gap of {teacher - alone:.3f} to the teacher, which is "
        "larger and trained longer; one seed each, so this shows how it works, not how much it helps"
    )
