"""`yolokd bench`: what a training step costs, beside Ultralytics' own distillation and beside the bound."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.files import increment_path

from yolokd.bench.contender import NATIVE, PLAIN, Setting, our_trainer, quiet
from yolokd.bench.rounds import Row, measure
from yolokd.bench.show import draw, table, write_csv
from yolokd.config import method_names
from yolokd.data import data_file, load_data
from yolokd.errors import UserError
from yolokd.plan import load_student

CONSOLE = Console(soft_wrap=True)
REAL_BATCHES = 8  # of the real epoch that a benchmark is checked against
AGREEMENT = 0.10


def run_bench(
    teacher: str = "yolov8l.yaml",
    student: str = "yolov8n.yaml",
    imgsz: object = 320,
    batch: object = 16,
    method: str = "none,native,sl2,dfd,pdf,dfd+pdf",
    amp: object = False,
    rounds: int = 7,
    data: str = "shapes",
    project: str = "runs/distill",
    name: str = "bench",
    memory: bool = True,
    **rest: Any,
) -> Path:
    """Measure training steps side by side; prints a table and writes bench.csv and bench.png, whose folder it returns.

    teacher (.yaml: random weights), imgsz, batch, method and amp may be lists, `a,b`: the first of teacher, imgsz and
    batch is combined with all others one at a time, to show how costs grow. Every contender makes one step per round.
    Shares of a step: `data` and `teacher` are measured, `student` is the plain step of the same run without its data,
    `methods` is what remains. Raises UserError for what cannot be trained.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UserError(f"rounds={rounds}", "must be a whole number of at least 1", "for example rounds=7")
    methods = _methods(method)
    amps = _list(amp)
    rows: list[Row] = []
    with TemporaryDirectory(prefix="yolokd-bench-") as folder, quiet():
        source = data_file(data)
        teachers = {t: _checkpoint(t, source, Path(folder)) for t in _list(teacher)}
        settings = [
            (str(t), Setting(teachers[t], str(student), int(size), int(count), source, folder, tuple(rest.items())))
            for t, size, count in _combinations(_list(teacher), _list(imgsz), _list(batch))
        ]
        for title, setting in settings:
            found = measure(setting, title, methods, amps, rounds, memory)
            CONSOLE.print(table(found))
            rows += found
        real = _agreement(rows[0], settings[0][1])
    out = Path(increment_path(Path(project) / name, mkdir=True))
    write_csv(rows, out / "bench.csv")
    draw(rows, out / "bench.png")
    CONSOLE.print(real, f"{out / 'bench.csv'}", f"{out / 'bench.png'}", sep="\n")
    return out


def _methods(method: str) -> list[str]:
    """Contenders in their order; plain training is always among them, and leads."""
    asked = [m.strip() for m in str(method).split(",")]
    for m in asked:
        if m != NATIVE:
            method_names(m)
    return [PLAIN, *(m for m in dict.fromkeys(asked) if m != PLAIN)]


def _list(value: object) -> list[Any]:
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, str):
        return [{"False": False, "True": True}.get(v.strip(), v.strip()) for v in value.split(",")]
    return [value]


def _combinations(teachers: list[Any], sizes: list[Any], batches: list[Any]) -> list[tuple[Any, Any, Any]]:
    first = (teachers[0], sizes[0], batches[0])
    return [
        first,
        *((t, *first[1:]) for t in teachers[1:]),
        *((first[0], s, first[2]) for s in sizes[1:]),
        *((*first[:2], b) for b in batches[1:]),
    ]


def _checkpoint(teacher: object, data: str, folder: Path) -> str:
    """A .pt of the teacher: the one given, or of random weights for a .yaml."""
    if not str(teacher).endswith((".yaml", ".yml")):
        return str(teacher)
    card = load_data(data)
    torch.manual_seed(0)
    model = load_student(teacher, card, trust=False)
    assert isinstance(model, DetectionModel)
    model.names = dict(card["names"])
    path = folder / f"{Path(str(teacher)).stem}.pt"
    torch.save({"model": model, "train_args": {}}, path)
    return str(path)


def _agreement(row: Row, setting: Setting) -> str:
    """Compare the benchmark's images per second with the second epoch of a real training, in words."""
    trainer = our_trainer(
        setting, setting.keys({"False": False, "True": True}.get(row.amp, row.amp), "real"), row.contender
    )
    count = len(list(Path(str(trainer.data["train"])).rglob("*.*"))) if isinstance(trainer.data["train"], str) else 0
    wanted = REAL_BATCHES * row.batch
    trainer.args.fraction = min(1.0, wanted / count) if count else 1.0
    clock: list[float] = []
    trainer.add_callback("on_train_epoch_start", lambda _: clock.append(time.perf_counter()))
    trainer.add_callback("on_train_epoch_end", lambda _: clock.append(time.perf_counter()))
    trainer.train()
    real = len(trainer.train_loader.dataset) / (clock[3] - clock[2])
    off = row.images_per_second / real - 1
    verdict = "agrees with" if abs(off) <= AGREEMENT else "DISAGREES with"
    return (
        f"{row.contender}: {row.images_per_second:.1f} images per second here {verdict} {real:.1f} in a real epoch "
        f"({off:+.0%}, {AGREEMENT:.0%} allowed)"
    )
