"""`yolokd bench`: measures what a training step costs, compared with Ultralytics' own distillation and with the bound.

The bound is the least that distillation must cost: a plain training step and the teacher's forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from ultralytics.utils.files import increment_path
from ultralytics.utils.torch_utils import select_device

from yolokd.commands.bench.candidate import FIXED, BenchSetting, Candidate, build_yolokd_trainer
from yolokd.commands.bench.rounds import BenchRow, ensemble_costs, measure, run_rounds
from yolokd.commands.bench.show import make_table, save_plot, write_csv
from yolokd.commands.candidates import DEFAULT_METHODS, NATIVE, PLAIN, parse_candidates
from yolokd.commands.native import check_native, check_same_levels
from yolokd.config.arguments import as_list, parse_value
from yolokd.config.defaults import defaults
from yolokd.config.validate import validate
from yolokd.data.dataset import data_file, load_data, split_images
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_student, load_teacher
from yolokd.models.detector import check_detector
from yolokd.models.teachers.backbone import is_backbone, load_backbone
from yolokd.patches.no_loggers import no_loggers
from yolokd.runtime.console import CONSOLE, print_table, table_width, warnings_only
from yolokd.runtime.files import check_project
from yolokd.training.settings import check_device

REAL_BATCHES = 8  # batches of the real epoch with which a benchmark is compared
TOLERANCE = 0.10  # largest relative difference from the real epoch that counts as agreement


def _is_ensemble(teachers: object, count: int) -> bool:
    """Return whether all `count` teachers teach at once, by the value of `teachers`."""
    example = "for example teachers=ensemble"
    validate("teachers", teachers, Literal["stages", "ensemble"], "must be stages or ensemble", example)
    if teachers == "ensemble" and count < 2:
        raise UserError("teachers=ensemble", "needs several teachers", "for example teacher=[a.pt,b.pt]")
    return teachers == "ensemble"


def run_bench(
    teacher: str = "yolov8l.yaml",
    student: str = "yolov8n.yaml",
    imgsz: object = 320,
    batch: object = 16,
    method: str = DEFAULT_METHODS,
    amp: object = None,
    rounds: int | None = None,
    data: str = "shapes",
    project: str = "runs/distill",
    name: str = "bench",
    memory: bool = True,
    **other_keys: Any,
) -> Path:
    """Measure training steps of several candidates in turn; print a table, and return the folder of the files written.

    The files are bench.csv and bench.png. In each round, every candidate runs one step.
    teacher (a .yaml gets random weights), imgsz, batch, method and amp may be lists, `a,b`. All methods and values of
    amp are measured with the first teacher, imgsz and batch, and then with each other value of one of these three.
    With teachers=ensemble, the ensemble is measured as the first teacher, and then each teacher alone.
    The parts of a candidate's step: `data`, `teacher` and `methods` (the distillation losses) are measured in its own
    steps, `student` is the rest. On CUDA the teacher runs beside the student: `teacher` is the time that the student
    waits for it. There the first batches are used again and again, since data loading would hide the GPU's time.
    amp: None for True on CUDA, as in a training, and False elsewhere. rounds: None for 40 on CUDA, and 7 elsewhere.
    other_keys: further keys of `yolokd train`. Raises UserError for what cannot be trained.
    """
    on_cuda = select_device(check_device(other_keys.get("device")), verbose=False).type == "cuda"
    rounds = (40 if on_cuda else 7) if rounds is None else rounds
    _check_keys(rounds, other_keys)
    check_project(project)
    # Plain training is always measured, first: the others are compared with it.
    methods = list(dict.fromkeys([PLAIN, *parse_candidates(method, other_keys)]))
    if NATIVE in methods:
        check_native(student, as_list(teacher), bool(other_keys.get("trust")))
    amps = [on_cuda] if amp is None else [parse_value(str(a)) for a in as_list(amp)]
    names = [str(t) for t in as_list(teacher)]
    ensemble = _is_ensemble(other_keys.pop("teachers", "stages"), len(names))
    groups = [*([tuple(names)] if ensemble else []), *((name,) for name in names)]
    combinations = _combinations(groups, _integers("imgsz", imgsz), _integers("batch", batch))
    with TemporaryDirectory(prefix="yolokd-bench-") as folder, warnings_only(), no_loggers():
        source = data_file(data)
        checkpoints = _teacher_checkpoints(
            names, source, Path(folder), student if NATIVE in methods else None, other_keys
        )
        shared = source, folder, tuple(other_keys.items())
        settings = [
            ("+".join(group), BenchSetting(tuple(checkpoints[t] for t in group), str(student), size, count, *shared))
            for group, size, count in combinations
        ]
        rows: list[BenchRow] = []
        out: Path | None = None
        for title, setting in settings:
            rows += _measure_setting(setting, title, methods, amps, rounds, memory)
            out = out or Path(increment_path(Path(str(project)) / str(name), mkdir=True))
            write_csv(rows, out / "bench.csv")  # after each setting, because a later one may run out of memory
            save_plot(rows, out / "bench.png")
        assert out is not None
        CONSOLE.print(out / "bench.csv", out / "bench.png", sep="\n")
        if ensemble:
            CONSOLE.print(*ensemble_costs(rows, names), sep="\n")
        _cross_check(rows, settings[0][1], rounds, out)
    return out


def _check_keys(rounds: object, other_keys: Mapping[str, Any]) -> None:
    """Raise UserError for keys of `yolokd train` that a benchmark does not take, and for a wrong number of rounds."""
    for key in ("unlabelled", "unlabelled_ratio"):
        if key in other_keys:
            raise UserError(key, "is not measured by bench: its batches hold labelled images alone", "drop it")
    for key in (*FIXED, "nbs", "cfg", "save_dir", "resume"):
        if key in other_keys:
            raise UserError(key, "is set by bench, or has no meaning to it", "drop it")
    validate("rounds", rounds, PositiveInt, "must be a whole number of at least 1", "for example rounds=7")


def _measure_setting(
    setting: BenchSetting, title: str, methods: Sequence[str], amps: Sequence[Any], rounds: int, memory: bool
) -> list[BenchRow]:
    """Measure all candidates of a setting, print a table of them, and return its rows. title: the teachers' names."""
    rows = measure(setting, title, methods, amps, rounds, memory)
    CONSOLE.print(f"{title}, {setting.imgsz} px, batch {setting.batch}: medians, in seconds per step")
    print_table(make_table(rows, table_width()))
    return rows


def _cross_check(rows: Sequence[BenchRow], first: BenchSetting, rounds: int, out: Path) -> None:
    """Compare the benchmark with a real epoch, and say what measuring gradients costs.

    first: the first setting. Writes a warning into the plot in `out` if the real epoch disagrees.
    """
    # The composition of most methods: there, measuring gradients costs most.
    checked = max(rows, key=lambda row: -1 if row.candidate in (PLAIN, NATIVE) else row.candidate.count("+"))
    agrees, comparison = _compare_with_real_epoch(checked, first)
    CONSOLE.print(comparison)
    if not agrees:
        save_plot(rows, out / "bench.png", warning=comparison)
    if checked.candidate not in (PLAIN, NATIVE):
        CONSOLE.print(_measure_gradient_cost(checked, first, rounds))


def _integers(key: str, value: object) -> list[int]:
    try:
        return [int(v) for v in as_list(value)]
    except (TypeError, ValueError) as e:
        raise UserError(f"{key}={value}", "must be one or several whole numbers", f"for example {key}=320,640") from e


def _combinations(teachers: list[Any], sizes: list[Any], batches: list[Any]) -> list[tuple[Any, Any, Any]]:
    """Return the first of each, and then every combination in which one of the three has another value."""
    first = (teachers[0], sizes[0], batches[0])
    return [
        first,
        *((t, *first[1:]) for t in teachers[1:]),
        *((first[0], s, first[2]) for s in sizes[1:]),
        *((*first[:2], b) for b in batches[1:]),
    ]


def _teacher_checkpoints(
    names: Sequence[str], data: str, folder: Path, native_student: object, other_keys: Mapping[str, Any]
) -> dict[str, str]:
    """Return the path of each teacher's .pt, by its name; a .yaml gets random weights, in `folder`.

    native_student: the student that Ultralytics' own distillation trains, if it is measured.
    Raises UserError for a teacher that cannot be measured, and for one whose levels are not the native student's.
    """
    trust = bool(other_keys.get("trust"))
    checkpoints = {name: _teacher_checkpoint(name, data, folder, trust) for name in names}
    if native_student is not None:
        own = load_student(native_student, load_data(data, trust=trust), trust)
        for checkpoint in checkpoints.values():
            check_same_levels(own, load_teacher(checkpoint, trust))
    return checkpoints


def _teacher_checkpoint(teacher: object, data: str, folder: Path, trust: bool) -> str:
    """Return the path of the teacher's .pt; for a .yaml, save one with random weights in `folder`.

    Raises UserError if the teacher is neither a checkpoint nor a .yaml of a YOLO detector.
    """
    if is_backbone(teacher):
        load_backbone(str(teacher))
        return str(teacher)
    if not str(teacher).endswith((".yaml", ".yml")):
        check_detector(load_teacher(str(teacher), trust), f"teacher={teacher}")
        return str(teacher)
    dataset = load_data(data, trust=trust)
    torch.manual_seed(0)
    try:
        model = load_student(teacher, dataset, trust)
    except UserError as e:
        problem = "does not describe a YOLO detector"
        raise UserError(f"teacher={teacher}", problem, "give a detector's .yaml, for example yolov8l.yaml") from e
    model.names = dict(dataset["names"])
    path = folder / f"{Path(str(teacher)).stem}.pt"
    torch.save({"model": model, "train_args": {}}, path)
    return str(path)


def _measure_gradient_cost(row: BenchRow, setting: BenchSetting, rounds: int) -> str:
    """Return a sentence on how much the measurement of gradients per level slows down a training.

    Runs steps with and without the measurement, in turn.
    """
    amp = parse_value(row.amp)
    every = int(dict(setting.other_keys).get("probe", defaults()["probe"]))
    never, always = (
        Candidate(replace(setting, other_keys=(*setting.other_keys, ("probe", n))), row.candidate, amp)
        for n in (10**9, 1)
    )
    times = run_rounds({"without": never, "with": always}, rounds, "measuring gradients")
    extra = times.ratio("with", "without") - 1
    return (
        f"{row.candidate}: a step that measures gradients takes {extra:.0%} longer. One step in {every} does "
        f"(probe={every}), which adds {extra / every:.2%} to the training time"
    )


def _compare_with_real_epoch(row: BenchRow, setting: BenchSetting) -> tuple[bool, str]:
    """Train two epochs, and compare the benchmark's images per second with those of the second epoch.

    Returns whether they agree, and a sentence that says so. On CUDA, where the benchmark loads no data, they need not.
    """
    trainer = build_yolokd_trainer(setting, setting.keys(parse_value(row.amp), "real"), row.candidate)
    images = sum(1 for _ in split_images(trainer.data["train"]))
    trainer.args.fraction = min(1.0, REAL_BATCHES * row.batch / images)
    times: list[float] = []  # start and end of the first epoch, then of the second
    trainer.add_callback("on_train_epoch_start", lambda _: times.append(time.perf_counter()))
    trainer.add_callback("on_train_epoch_end", lambda _: times.append(time.perf_counter()))
    trainer.train()
    real = len(trainer.train_loader.dataset) / (times[3] - times[2])
    difference = row.images_per_second / real - 1
    if trainer.device.type == "cuda":
        return True, (
            f"{row.candidate}: {row.images_per_second:.1f} images per second, without the loading of data; a real "
            f"epoch with {trainer.args.workers} workers has {real:.1f}"
        )
    agrees = abs(difference) <= TOLERANCE
    verdict = "agrees with" if agrees else "DISAGREES with"
    return agrees, (
        f"{row.candidate}: the benchmark's {row.images_per_second:.1f} images per second {verdict} {real:.1f} in a "
        f"real epoch (difference {difference:+.0%}, allowed {TOLERANCE:.0%})"
    )
