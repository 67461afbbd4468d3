"""Runs candidates in turn, round by round, and summarizes the times of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from yolokd.commands.bench.candidate import NATIVE_ALL, BenchSetting, Candidate, StepSeconds, TeacherAlone
from yolokd.commands.bench.memory import peak_mib
from yolokd.commands.candidates import NATIVE, PLAIN
from yolokd.runtime.console import make_progress

WARM_UP = 2  # first steps of each candidate, which are not counted


@dataclass
class Rounds:
    """The times of every candidate's steps, round by round."""

    seconds: dict[str, list[StepSeconds]] = field(default_factory=dict)

    def add(self, label: str, seconds: StepSeconds) -> None:
        """Add one step of the candidate `label`."""
        self.seconds.setdefault(label, []).append(seconds)

    def median(self, label: str, part: str = "step") -> float:
        """Return the median seconds of a candidate's steps, or of one part of them (a field of StepSeconds)."""
        return float(median(getattr(s, part) for s in self.seconds[label]))

    def parts(self, label: str) -> dict[str, float]:
        """Return the median seconds of the parts of a candidate's steps, by the name of BenchRow's fields."""
        data, teacher, methods = (self.median(label, part) for part in ("data", "teacher", "methods"))
        student = max(self.median(label) - data - teacher - methods, 0.0)
        return {"data": data, "teacher_seconds": teacher, "student": student, "methods": methods}

    def ratio(self, label: str, *others: str) -> float:
        """Return the median over rounds of a candidate's seconds, divided by the sum of the others' in that round."""
        columns = [self.seconds[other] for other in others]
        rounds = zip(self.seconds[label], zip(*columns, strict=True), strict=True)
        return float(median(seconds.step / sum(s.step for s in row) for seconds, row in rounds))


@dataclass
class BenchRow:
    """A candidate's median times in seconds, and its times relative to others in the same rounds.

    data, teacher_seconds and methods are measured in its own steps; student is the rest of them.
    """

    teacher: str
    imgsz: int
    batch: int
    contender: str  # the candidate's method; the name of a column of bench.csv
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
    times_native: float | None = None  # speed relative to Ultralytics' distillation with its default threads
    times_native_all_cores: float | None = None
    times_bound: float | None = None  # time relative to the sum of a plain step and a teacher's forward pass
    peak_mib: float | None = None


def measure(
    setting: BenchSetting, teacher: str, methods: Sequence[str], amps: Sequence[Any], rounds: int, memory: bool
) -> list[BenchRow]:
    """Measure every method in every precision, and Ultralytics' distillation, and return a row for each.

    teacher: the name to print. memory: whether to measure peak memory, too.
    """
    candidates = {f"{m} {amp}": Candidate(setting, m, amp) for amp in amps for m in methods if m != NATIVE}
    if NATIVE in methods:
        on_cpu = next(iter(candidates.values())).trainer.device.type == "cpu"
        amp = False if on_cpu and amps[0] == "bf16" else amps[0]  # Ultralytics' loop refuses bf16 on CPUs
        if f"{PLAIN} {amp}" not in candidates:
            candidates[f"{PLAIN} {amp}"] = Candidate(setting, PLAIN, amp)
        native = candidates[NATIVE] = Candidate(setting, NATIVE, amp)
        if native.threads != next(iter(candidates.values())).threads:
            candidates[NATIVE_ALL] = Candidate(setting, NATIVE_ALL, amp)
    steppers: dict[str, Candidate | TeacherAlone] = dict(candidates)
    distilled = next((c for c in candidates.values() if c.method not in (PLAIN, NATIVE, NATIVE_ALL)), None)
    if distilled is not None:
        steppers["teacher"] = TeacherAlone(distilled)
    times = run_rounds(steppers, rounds, f"{teacher} at {setting.imgsz}, batch {setting.batch}")
    peaks = {label: peak_mib(setting, c) for label, c in candidates.items()} if memory else {}
    return [_make_row(times, label, c, setting, teacher, peaks.get(label)) for label, c in candidates.items()]


def run_rounds(steppers: Mapping[str, Candidate | TeacherAlone], rounds: int, title: str) -> Rounds:
    """Run one step of every stepper in each round, after WARM_UP rounds that are not counted; return the times."""
    times = Rounds()
    with make_progress() as progress:
        task = progress.add_task(title, total=(rounds + WARM_UP) * len(steppers))
        for number in range(WARM_UP + rounds):
            for label, stepper in steppers.items():
                seconds = stepper.step()
                if number >= WARM_UP:
                    times.add(label, seconds)
                progress.advance(task)
    return times


def _make_row(
    times: Rounds, label: str, candidate: Candidate, setting: BenchSetting, teacher: str, peak: float | None
) -> BenchRow:
    step, all_steps = times.median(label), [s.step for s in times.seconds[label]]
    row = BenchRow(
        teacher, setting.imgsz, setting.batch, candidate.method, candidate.amp, candidate.threads, step,
        max(all_steps), min(all_steps), setting.batch / step, **times.parts(label), peak_mib=peak,
    )  # fmt: skip
    if NATIVE in times.seconds:
        row.times_native = times.ratio(NATIVE, label)
    if NATIVE_ALL in times.seconds:
        row.times_native_all_cores = times.ratio(NATIVE_ALL, label)
    if "teacher" in times.seconds and candidate.method != PLAIN:
        row.times_bound = times.ratio(label, f"{PLAIN} {candidate.amp}", "teacher")
    return row
