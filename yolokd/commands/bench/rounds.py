"""Contenders in turn, round by round, and what their steps come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from yolokd.commands.bench.candidate import NATIVE_ALL, BenchSetting, Candidate, Seconds, TeacherAlone
from yolokd.commands.bench.memory import peak_mib
from yolokd.commands.candidates import NATIVE, PLAIN

WARM_UP = 2  # steps of each contender before those that count


@dataclass
class Rounds:
    """Steps of every contender, round by round."""

    seconds: dict[str, list[Seconds]] = field(default_factory=dict)

    def add(self, label: str, found: Seconds) -> None:
        """Record one step."""
        self.seconds.setdefault(label, []).append(found)

    def median(self, label: str, part: str = "step") -> float:
        """Median seconds of a contender's steps, or of a part of them."""
        return float(median(getattr(s, part) for s in self.seconds[label]))

    def ratio(self, label: str, *others: str) -> float:
        """Median over rounds of a contender's seconds over the sum of others' in the same round."""
        columns = [self.seconds[other] for other in others]
        rounds = zip(self.seconds[label], zip(*columns, strict=True), strict=True)
        return float(median(own.step / sum(s.step for s in row) for own, row in rounds))


@dataclass
class BenchRow:
    """One contender's medians in seconds, and its ratios to others of the same rounds."""

    teacher: str
    imgsz: int
    batch: int
    contender: str
    amp: str
    threads: int
    step: float
    slowest: float
    fastest: float
    images_per_second: float
    data: float
    teacher_seconds: float
    student: float
    methods: float
    times_native: float | None = None  # how many times as fast as Ultralytics' distillation, as users have it
    times_native_all_cores: float | None = None
    times_bound: float | None = None  # how many times as slow as a plain step and the teacher's forward, one by one
    peak_mib: float | None = None


def measure(
    setting: BenchSetting, teacher: str, methods: Sequence[str], amps: Sequence[Any], rounds: int, memory: bool
) -> list[BenchRow]:
    """All contenders of one setting: every method in every precision, native ones, and the teacher alone."""
    parse_candidates = {f"{m} {amp}": Candidate(setting, m, amp) for amp in amps for m in methods if m != NATIVE}
    if NATIVE in methods:
        on_cpu = next(iter(parse_candidates.values())).trainer.device.type == "cpu"
        amp = False if on_cpu and amps[0] == "bf16" else amps[0]  # Ultralytics' loop refuses bf16 on CPUs
        if f"{PLAIN} {amp}" not in parse_candidates:
            parse_candidates[f"{PLAIN} {amp}"] = Candidate(setting, PLAIN, amp)
        native = parse_candidates[NATIVE] = Candidate(setting, NATIVE, amp)
        if native.threads != next(iter(parse_candidates.values())).threads:
            parse_candidates[NATIVE_ALL] = Candidate(setting, NATIVE_ALL, amp)
    steppers: dict[str, Candidate | TeacherAlone] = dict(parse_candidates)
    taught = next((c for c in parse_candidates.values() if c.method not in (PLAIN, NATIVE, NATIVE_ALL)), None)
    if taught is not None:
        steppers["teacher"] = TeacherAlone(taught)
    found = run_rounds(steppers, rounds, f"{teacher} at {setting.imgsz}, batch {setting.batch}")
    peaks = {label: peak_mib(setting, c) for label, c in parse_candidates.items()} if memory else {}
    return [_row(found, label, c, setting, teacher, peaks.get(label)) for label, c in parse_candidates.items()]


def run_rounds(steppers: Mapping[str, Candidate | TeacherAlone], rounds: int, title: str) -> Rounds:
    """Every stepper makes one step a round; those of the first rounds do not count."""
    found = Rounds()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=(rounds + WARM_UP) * len(steppers))
        for number in range(WARM_UP + rounds):
            for label, stepper in steppers.items():
                seconds = stepper.step()
                if number >= WARM_UP:
                    found.add(label, seconds)
                progress.advance(task)
    return found


def _row(
    found: Rounds, label: str, contender: Candidate, setting: BenchSetting, teacher: str, peak: float | None
) -> BenchRow:
    step, data, taught = (found.median(label, part) for part in ("step", "data", "teacher"))
    plain = f"{PLAIN} {contender.amp}"
    student = found.median(plain) - found.median(plain, "data")
    all_steps = [s.step for s in found.seconds[label]]
    row = BenchRow(
        teacher, setting.imgsz, setting.batch, contender.method, contender.amp, contender.threads, step,
        max(all_steps), min(all_steps), setting.batch / step, data, taught, student,
        max(step - data - taught - student, 0.0), peak_mib=peak,
    )  # fmt: skip
    if NATIVE in found.seconds:
        row.times_native = found.ratio(NATIVE, label)
    if NATIVE_ALL in found.seconds:
        row.times_native_all_cores = found.ratio(NATIVE_ALL, label)
    if "teacher" in found.seconds and contender.method != PLAIN:
        row.times_bound = found.ratio(label, plain, "teacher")
    return row
