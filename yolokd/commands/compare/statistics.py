"""What seeds say: paired differences to the baseline, with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import covariance, fmean, stdev, variance

from scipy.stats import t as student_t

from yolokd.commands.compare.ledger import LedgerRow

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval; without bounds where one seed alone is there, or nothing bounds it."""

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Whether it has bounds and both lie on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % interval of independent values.

    >>> str(interval([0.01, 0.02, 0.03]))
    '+0.020 (-0.005 to +0.045)'
    """
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None)
    half = _quantile(n) * stdev(values) / sqrt(n)
    return Interval(mean, mean - half, mean + half)


def ratio(parts: Sequence[float], wholes: Sequence[float]) -> Interval:
    """The ratio of two means over the same seeds, with Fieller's 95 % interval: the noise of both counts.

    It excludes 0 where that of the mean part does; without bounds where the mean whole may itself be 0.

    >>> found = ratio([0.9, 1.1], [2.0, 2.0])  # a whole that is known
    >>> [round(v, 3) for v in (found.mean, found.low, found.high)]
    [0.5, -0.135, 1.135]
    """
    part, whole, n = fmean(parts), fmean(wholes), len(parts)
    if n < 2:
        return Interval(part / whole, None, None)
    noise = _quantile(n) ** 2 / n
    a = whole**2 - noise * variance(wholes)
    b = part * whole - noise * covariance(parts, wholes)
    c = part**2 - noise * variance(parts)
    if a <= 0:
        return Interval(part / whole, None, None)
    half = sqrt(max(b**2 - a * c, 0.0)) / a
    return Interval(part / whole, b / a - half, b / a + half)


def _quantile(n: int) -> float:
    return float(student_t.ppf((1 + LEVEL) / 2, n - 1))


@dataclass(frozen=True)
class Summary:
    """One method over its seeds, and against the baseline's same seeds."""

    method: str
    is_baseline: bool
    rows: tuple[LedgerRow, ...]
    difference: Interval | None  # of mAP50-95, paired by seed; None for the baseline itself, and without common seeds
    share: Interval | None  # of the gap to the teacher that is closed; None where there is no gap
    against_native: Interval | None  # as difference, to Ultralytics' own distillation
    improved: int
    pairs: int

    @property
    def deviation(self) -> float | None:
        """Standard deviation of mAP50-95 over seeds."""
        return stdev(row.map for row in self.rows) if len(self.rows) > 1 else None

    @property
    def images_per_second(self) -> float:
        """Mean over seeds."""
        return fmean(row.images_per_second for row in self.rows)

    @property
    def verdict(self) -> str:
        """In words; never better than its interval."""
        if self.is_baseline:
            return "baseline"
        if self.difference is None:
            return "no seed of the baseline's"
        if self.difference.low is None:
            return "one seed: nothing to say"
        if not self.difference.excludes_zero:
            return "no clear difference"
        return "better" if self.difference.mean > 0 else "worse"


def summarize(
    rows: Sequence[LedgerRow], baseline: str | None, native: str | None, teachers: Sequence[LedgerRow]
) -> list[Summary]:
    """Each method's summary, in order of first appearance, of rows that each have a method and a seed of their own.

    baseline, native: the names by which these two go among the rows. teachers: those that the rows name, as far as they
    have a score; each method is told by its own.
    """
    scores = {teacher.hash: teacher.map for teacher in teachers}
    base = _by_seed(rows, baseline)
    found = []
    for method in dict.fromkeys(row.method for row in rows):
        own = tuple(sorted((row for row in rows if row.method == method), key=lambda row: row.seed))
        reference = base if method != baseline else {}
        differences = _differences(own, reference)
        taught = scores.get(own[0].teacher_row)
        gaps = [taught - reference[row.seed] for row in own if row.seed in reference] if taught is not None else []
        against = _differences(own, _by_seed(rows, native)) if method not in (baseline, native) else []
        found.append(
            Summary(
                method,
                method == baseline,
                own,
                interval(differences) if differences else None,
                ratio(differences, gaps) if gaps and fmean(gaps) > 0 else None,
                interval(against) if against else None,
                sum(d > 0 for d in differences),
                len(differences),
            )
        )
    return found


def _by_seed(rows: Sequence[LedgerRow], method: str | None) -> dict[int, float]:
    return {row.seed: row.map for row in rows if row.method == method}


def _differences(rows: Sequence[LedgerRow], reference: Mapping[int, float]) -> list[float]:
    return [row.map - reference[row.seed] for row in rows if row.seed in reference]
