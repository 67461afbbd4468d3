"""Runs candidates in turn, round by round, and summarizes the times of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from yolokd.commands.bench.candidate import (
    NATIVE_ALL,
    BenchSetting,
    Candidate,
    StepSeconds,
    TeacherAlone,
    busy_seconds,
    requested_outputs,
)
from yolokd.commands.bench.memory import peak_mib
from yolokd.commands.candidates import NATIVE, PLAIN
from yolokd.runtime.console import make_progress

WARM_UP = {"cpu": 2, "cuda": 10}  # first steps of each candidate, which are not counted


@dataclass
class Rounds:
    """The times of every candidate's steps, round by round.

    busy: on CUDA, the seconds of a step in which the GPU works.
    """

    seconds: dict[str, list[StepSeconds]] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)

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

    def times_bound(self, label: str, plain: str, teacher: str) -> float:
        """Return the median over rounds of a candidate's seconds, divided by the least that they could be.

        That is a plain step and the teacher's forward pass; on CUDA, where both overlap, a plain step, but at least the
        time in which the GPU works for both.
        """
        if not self.busy:
            return self.ratio(label, plain, teacher)
        rounds, work = zip(self.seconds[label], self.seconds[plain], strict=True), self.busy[plain] + self.busy[teacher]
        return float(median(step.step / max(alone.step, work) for step, alone in rounds))


@dataclass
class BenchRow:
    """A candidate's median times in seconds, and its times relative to others in the same rounds.

    data, teacher_seconds and methods are measured in its own steps; student is the rest of them.
    """

    teacher: str
    imgsz: int
    batch: int
    candidate: str  # the candidate's method; the name of a column of bench.csv
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
    times_bound: float | None = None  # see Rounds.times_bound
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
        requests = {r for c in candidates.values() if (r := requested_outputs(c)) is not None}
        steppers |= {f"teacher {requested}": TeacherAlone(distilled, requested) for requested in requests}
    times = run_rounds(steppers, rounds, f"{teacher} at {setting.imgsz}, batch {setting.batch}")
    if next(iter(candidates.values())).trainer.device.type == "cuda":
        alone = {k: s for k, s in steppers.items() if isinstance(s, TeacherAlone) or s.method == PLAIN}
        times.busy = {label: busy_seconds(stepper) for label, stepper in alone.items()}
    peaks = {label: peak_mib(setting, c) for label, c in candidates.items()} if memory else {}
    return [_make_row(times, label, c, setting, teacher, peaks.get(label)) for label, c in candidates.items()]


def run_rounds(steppers: Mapping[str, Candidate | TeacherAlone], rounds: int, title: str) -> Rounds:
    """Run one step of every stepper in each round, after WARM_UP rounds that are not counted; return the times."""
    times = Rounds()
    devices = {s.trainer.device.type for s in steppers.values() if isinstance(s, Candidate)}
    warm_up = max(WARM_UP.get(device, WARM_UP["cpu"]) for device in devices)
    with make_progress() as progress:
        task = progress.add_task(title, total=(rounds + warm_up) * len(steppers))
        for number in range(warm_up + rounds):
            for label, stepper in steppers.items():
                seconds = stepper.step()
                if number >= warm_up:
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
    alone = f"teacher {requested_outputs(candidate)}"
    runs_one_of_several = candidate.method.startswith(NATIVE) and len(setting.teachers) > 1  # the bound runs all
    if alone in times.seconds and not runs_one_of_several:
        row.times_bound = times.times_bound(label, f"{PLAIN} {candidate.amp}", alone)
    return row


def ensemble_costs(rows: Sequence[BenchRow], teachers: Sequence[str]) -> list[str]:
    """Return a sentence for each method on what an ensemble costs, beside what its teachers cost alone.

    The cost is that of the teachers' forward passes and of the distillation losses. rows: of the ensemble and of each
    teacher alone, in the same image size and batch.
    """
    first = rows[0]
    costs: dict[tuple[str, str], dict[str, float]] = {}  # by method and precision, then by teacher
    for row in (row for row in rows if not row.candidate.startswith(NATIVE)):
        if (row.imgsz, row.batch) == (first.imgsz, first.batch) and row.teacher_seconds:
            costs.setdefault((row.candidate, row.amp), {})[row.teacher] = row.teacher_seconds + row.methods
    sentences = []
    for (method, amp), by_teacher in costs.items():
        alone = [by_teacher[teacher] for teacher in teachers if teacher in by_teacher]
        if first.teacher in by_teacher and len(alone) == len(teachers):
            cost, parts = by_teacher[first.teacher], " + ".join(f"{seconds:.3f}" for seconds in alone)
            sentences.append(
                f"{method} (amp={amp}): the ensemble costs {cost:.3f} s of a step, its teachers alone {parts} s: "
                f"{cost / sum(alone):.0%} of their sum"
            )
    return sentences
