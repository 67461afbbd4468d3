"""`yolokd demo`: training, distillation, export and detection on the drawn data set, on CPUs and without a network."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import NonNegativeInt
from rich.table import Table
from ultralytics.utils.files import increment_path

from yolokd.config.arguments import check_known
from yolokd.config.parse import method_names
from yolokd.config.validate import validate
from yolokd.data import shapes
from yolokd.distiller import DEFAULT_PROJECT, YoloDistiller
from yolokd.errors import UserError
from yolokd.exporter.export_model import export
from yolokd.report.history import MAP, read_history
from yolokd.report.run_report import NAME as REPORT
from yolokd.runtime.bundled import bundled_folder
from yolokd.runtime.console import CONSOLE, print_table
from yolokd.runtime.files import atomic_path, check_project
from yolokd.runtime.plots import new_plot
from yolokd.runtime.signals import Interrupted
from yolokd.training.resume.sidecar import is_trained
from yolokd.version import __version__

# Ours, found by experiment on the drawn data set: with so few steps, AdamW and mild augmentation work best.
SETTINGS: Mapping[str, Any] = {
    "imgsz": 128, "batch": 16, "nbs": 16, "optimizer": "AdamW", "momentum": 0.9, "warmup_bias_lr": 0.0,
    "mosaic": 0.0, "close_mosaic": 0, "scale": 0.1, "translate": 0.05, "hsv_s": 0.2, "hsv_v": 0.2, "amp": False,
    "channels_last": True, "cache": "ram", "plots": False, "verbose": False, "device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Training:
    """One Ultralytics model, and how long and at what learning rate it trains."""

    model: str
    epochs: int
    lr0: float


@dataclass(frozen=True)
class Recipe:
    """The models that the demo trains, and the number of images in each split.

    Found by experiment, like SETTINGS. The student trains with the same settings alone and distilled.
    """

    teacher: Training = Training("yolov8s.yaml", epochs=25, lr0=0.0015)
    student: Training = Training("yolov8n.yaml", epochs=14, lr0=0.002)
    counts: Mapping[str, int] = field(default_factory=lambda: shapes.COUNTS)


SHORT = Recipe(
    Training("yolov8n.yaml", 1, 0.002), Training("yolov8n.yaml", 1, 0.002), {"train": 32, "val": 16, "test": 4}
)


RECORD, PLOT = "demo.json", "demo.png"  # in the demo's folder: what it was started with; drawn at its end


@dataclass(frozen=True)
class DemoRun:
    """One training of the demo, in a folder of its own."""

    name: str
    training: Training
    folder: Path

    @property
    def weights(self) -> Path:
        """Return the folder that holds last.pt, best.pt and its exports."""
        return self.folder / "weights"

    @property
    def map_by_epoch(self) -> list[float]:
        """Return mAP50-95 on the validation set after each epoch."""
        return read_history(self.folder).column(MAP)

    @property
    def seconds(self) -> float:
        """Return how long all epochs took."""
        return read_history(self.folder).seconds

    @property
    def score(self) -> float:
        """Return mAP50-95 of best.pt on the validation set."""
        return max(self.map_by_epoch)


def run_demo(short: bool = False, seed: int = 0, method: str = "fitnet+pdf", **unknown: Any) -> None:
    """Train a teacher, a student alone and a distilled student; score, export and check the last, and detect with it.

    short=True does all this on a few images in one epoch each, to try an installation. A demo that was interrupted goes
    on where it stopped when it is started again with the same keys.
    Raises UserError for an unknown key or method and for an invalid seed, and RuntimeError if the export fails its
    check.
    """
    check_known(unknown, ("short", "seed", "method"), "short, seed or method")
    validate("short", short, bool, "must be True or False", "for example short=True")
    validate("seed", seed, NonNegativeInt, "must be a whole number of at least 0", "for example seed=0")
    if not method_names(method):
        raise UserError("method=none", "the demo needs a method to distil with", "for example method=fitnet+pdf")
    check_project(DEFAULT_PROJECT, "folder")
    keys = {"short": short, "seed": seed, "method": method}
    try:
        _run(SHORT if short else Recipe(), demo_folder(keys), seed, method)
    except KeyboardInterrupt as e:
        command = shlex.join(["yolokd", "demo", *(f"{key}={value}" for key, value in keys.items())])
        signum = getattr(e, "signum", signal.SIGINT)
        raise Interrupted(signum, f"to continue: {command}") from e


def demo_folder(keys: Mapping[str, Any]) -> Path:
    """Return the folder of an unfinished demo with the same keys and version, or a new one."""
    record = json.dumps({**keys, "yolokd": __version__}).encode()
    for path in sorted(DEFAULT_PROJECT.glob(f"demo*/{RECORD}")):
        if path.read_bytes() == record and not (path.parent / PLOT).exists():
            CONSOLE.print("the demo continues in", path.parent)
            return path.parent.absolute()
    folder = Path(increment_path(DEFAULT_PROJECT / "demo", mkdir=True)).absolute()
    with atomic_path(folder / RECORD) as temporary:
        temporary.write_bytes(record)
    return folder


def _run(recipe: Recipe, folder: Path, seed: int, method: str) -> None:
    """Run the demo in its folder; skip the trainings that are finished."""
    started = time.time()
    data = shapes.ensure(counts=recipe.counts)
    runs = _train_all(recipe, str(data), folder, seed, method)
    best = runs[-1].weights / "best.pt"
    CONSOLE.rule("export and detection")
    report = export(best, imgsz=SETTINGS["imgsz"], dynamic=True)
    if not report.passed:
        raise RuntimeError(f"{report.path}: its results differ from the checkpoint's; see {report.parity}")
    annotated = _detect(report.path, data.parent / "images" / "test", best.parent / "detections")
    plot_map(runs, folder / PLOT)
    print_table(_scores_table(runs, seed))
    CONSOLE.print(_summarize(*(run.score for run in runs)))
    CONSOLE.print(f"total time: {time.time() - started:.0f} s")
    CONSOLE.print("the distilled model:", best, report.path, sep="\n  ")
    CONSOLE.print("images to open:", folder / PLOT, *annotated, sep="\n  ")
    CONSOLE.print("the report, to open in a browser:", runs[-1].folder / REPORT, sep="\n  ")


def _train_all(recipe: Recipe, data: str, folder: Path, seed: int, method: str) -> list[DemoRun]:
    """Train the teacher, the student alone and the distilled student, and return the runs in this order."""

    def train(name: str, training: Training, **keys: Any) -> DemoRun:
        run = DemoRun(name, training, folder / name)
        CONSOLE.rule(f"{name}: {training.model}, {training.epochs} epochs, seed {seed}")
        last = run.weights / "last.pt"
        if is_trained(last):
            CONSOLE.print("is trained")
        elif last.exists():
            YoloDistiller().train(resume=str(run.folder))
        else:
            settings = {**SETTINGS, "data": data, "save_dir": str(run.folder), "seed": seed}
            distiller = YoloDistiller(student=training.model, **keys)
            distiller.train(**settings, epochs=training.epochs, lr0=training.lr0)
        return run

    teacher = train("teacher", recipe.teacher, method="none")
    alone = train("student-alone", recipe.student, method="none")
    distilled = train("student-distilled", recipe.student, method=method, teacher=teacher.weights / "best.pt")
    return [teacher, alone, distilled]


def _detect(onnx: Path, images: Path, out: Path) -> list[Path]:
    """Run export/detect.py on four test images, as on a device without torch; return the annotated copies."""
    inputs = out / "input"
    inputs.mkdir(parents=True, exist_ok=True)
    for image in sorted(images.glob("*.jpg"))[:4]:
        (inputs / image.name).write_bytes(image.read_bytes())
    script, json_file = bundled_folder("export") / "detect.py", out / "detections.json"
    subprocess.run([sys.executable, script, onnx, inputs, "--out", out, "--json", json_file], check=True)
    return sorted(out.glob("*.jpg"))


def plot_map(runs: Sequence[DemoRun], path: Path) -> None:
    """Plot each run's validation mAP50-95 over the epochs, and save it as a PNG."""
    with new_plot(path) as figure:
        figure.set_size_inches(7, 4)
        axes = figure.subplots()
        for run in runs:
            epochs = range(1, len(run.map_by_epoch) + 1)
            axes.plot(epochs, run.map_by_epoch, marker=".", label=f"{run.name}: {run.score:.3f}")
        axes.set(xlabel="epoch", ylabel="mAP50-95 (validation)", title="yolokd demo, drawn data set")
        axes.legend()
        axes.grid(alpha=0.3)


def _scores_table(runs: Sequence[DemoRun], seed: int) -> Table:
    table = Table("run", "epochs", "seed", "mAP50-95", "seconds", title="validation scores")
    for run in runs:
        table.add_row(run.name, str(run.training.epochs), str(seed), f"{run.score:.3f}", f"{run.seconds:.0f}")
    return table


def _summarize(teacher: float, alone: float, distilled: float) -> str:
    return (
        f"distillation changed the student's mAP50-95 by {distilled - alone:+.3f}; the teacher's differs by "
        f"{teacher - alone:+.3f} from that of the student alone. This is one seed each: it shows how distillation "
        "works, not how much it helps"
    )
