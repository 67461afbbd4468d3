"""`yolokd bench`: what a training step costs, beside Ultralytics' own distillation and beside the bound."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ultralytics.utils.files import increment_path

from yolokd.commands.bench.candidate import BenchSetting, Candidate, our_trainer, quiet
from yolokd.commands.bench.rounds import BenchRow, measure, run_rounds
from yolokd.commands.bench.show import draw, table, write_csv
from yolokd.commands.candidates import DEFAULT_METHODS, NATIVE, PLAIN, parse_candidates
from yolokd.config.arguments import as_list, parse_value
from yolokd.config.defaults import defaults
from yolokd.data.dataset import data_file, load_data, split_images
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_student, load_teacher
from yolokd.runtime.console import CONSOLE, print_table

REAL_BATCHES = 8  # of the real epoch that a benchmark is checked against
AGREEMENT = 0.10


def run_bench(
    teacher: str = "yolov8l.yaml",
    student: str = "yolov8n.yaml",
    imgsz: object = 320,
    batch: object = 16,
    method: str = DEFAULT_METHODS,
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
    # Plain training is always among them, and leads.
    methods = list(dict.fromkeys([PLAIN, *parse_candidates(method, rest)]))
    ours = [m for m in methods if m not in (PLAIN, NATIVE)]
    amps = [parse_value(str(a)) for a in as_list(amp)]
    rows: list[BenchRow] = []
    out: Path | None = None
    with TemporaryDirectory(prefix="yolokd-bench-") as folder, quiet():
        source = data_file(data)
        teachers = {t: _checkpoint(t, source, Path(folder), bool(rest.get("trust"))) for t in as_list(teacher)}
        settings = [
            (str(t), BenchSetting(teachers[t], str(student), size, count, source, folder, tuple(rest.items())))
            for t, size, count in _combinations(as_list(teacher), _numbers("imgsz", imgsz), _numbers("batch", batch))
        ]
        for title, setting in settings:
            found = measure(setting, title, methods, amps, rounds, memory)
            print_table(table(found))
            rows += found
            out = out or Path(increment_path(Path(str(project)) / str(name), mkdir=True))
            write_csv(rows, out / "bench.csv")  # after each: a later setting may run out of memory
            draw(rows, out / "bench.png")
        assert out is not None
        CONSOLE.print(out / "bench.csv", out / "bench.png", sep="\n")
        # The largest composition (of the first setting): measuring it costs most.
        checked = max(rows, key=lambda row: row.contender.count("+") if row.contender in ours else -1)
        CONSOLE.print(_agreement(checked, settings[0][1]))
        if ours:
            CONSOLE.print(_measuring(checked, settings[0][1], rounds))
    return out


def _numbers(key: str, value: object) -> list[int]:
    try:
        return [int(v) for v in as_list(value)]
    except (TypeError, ValueError) as e:
        raise UserError(f"{key}={value}", "is no number, nor several", f"for example {key}=320,640") from e


def _combinations(teachers: list[Any], sizes: list[Any], batches: list[Any]) -> list[tuple[Any, Any, Any]]:
    first = (teachers[0], sizes[0], batches[0])
    return [
        first,
        *((t, *first[1:]) for t in teachers[1:]),
        *((first[0], s, first[2]) for s in sizes[1:]),
        *((*first[:2], b) for b in batches[1:]),
    ]


def _checkpoint(teacher: object, data: str, folder: Path, trust: bool) -> str:
    """A .pt of the teacher: the one given, or of random weights for a .yaml; `UserError` where it is neither."""
    if not str(teacher).endswith((".yaml", ".yml")):
        load_teacher(str(teacher), trust)
        return str(teacher)
    card = load_data(data)
    torch.manual_seed(0)
    try:
        model = load_student(teacher, card, trust)
    except UserError as e:
        raise UserError(f"teacher={teacher}", "is no YOLO detector's .yaml", "for example yolov8l.yaml") from e
    model.names = dict(card["names"])
    path = folder / f"{Path(str(teacher)).stem}.pt"
    torch.save({"model": model, "train_args": {}}, path)
    return str(path)


def _measuring(row: BenchRow, setting: BenchSetting, rounds: int) -> str:
    """What measuring gradients level by level adds to a training, in words: steps with and without it, in turns."""
    amp = parse_value(row.amp)
    every = int(dict(setting.rest).get("probe", defaults()["probe"]))
    never, always = (
        Candidate(replace(setting, rest=(*setting.rest, ("probe", n))), row.contender, amp) for n in (10**9, 1)
    )
    found = run_rounds({"without": never, "with": always}, rounds, "measuring gradients")
    extra = found.ratio("with", "without") - 1
    return (
        f"{row.contender}: a step that measures gradients takes {extra:.0%} longer: {extra / every:.2%} of training, "
        f"with one in {every} (probe={every})"
    )


def _agreement(row: BenchRow, setting: BenchSetting) -> str:
    """Compare the benchmark's images per second with the second epoch of a real training, in words."""
    trainer = our_trainer(setting, setting.keys(parse_value(row.amp), "real"), row.contender)
    images = sum(1 for _ in split_images(trainer.data["train"]))
    trainer.args.fraction = min(1.0, REAL_BATCHES * row.batch / images)
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
