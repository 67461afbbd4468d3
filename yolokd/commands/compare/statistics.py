"""Statistics over seeds: paired differences to the baseline, with their 95 % intervals."""

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
    """A mean over seeds and its 95 % interval.

    low, high: None if there is one seed only, or if the values give no bounds.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def excludes_zero(self) -> bool:
        """Return whether there are bounds and both lie on one side of 0."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.3f}"
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean and the 95 % interval (Student's t) of independent values.

    >>> str(interval([0.01, 0.02, 0.03]))
    '+0.020 (-0.005 to +0.045)'
    """
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(mean, None, None)
    half = _quantile(n) * stdev(values) / sqrt(n)
    return Interval(mean, mean - half, mean + half)


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Interval:
    """Return the ratio of two means over the same seeds, with Fieller's 95 % interval.

    The interval counts the noise of both means. It excludes 0 if the interval of the numerators' mean does. It has no
    bounds if the denominators' mean may be 0.

    >>> result = ratio([0.9, 1.1], [2.0, 2.0])  # the denominator has no noise
    >>> [round(v, 3) for v in (result.mean, result.low, result.high)]
    [0.5, -0.135, 1.135]
    """
    numerator, denominator, n = fmean(numerators), fmean(denominators), len(numerators)
    if n < 2:
        return Interval(numerator / denominator, None, None)
    noise = _quantile(n) ** 2 / n
    a = denominator**2 - noise * variance(denominators)
    b = numerator * denominator - noise * covariance(numerators, denominators)
    c = numerator**2 - noise * variance(numerators)
    if a <= 0:
        return Interval(numerator / denominator, None, None)
    half = sqrt(max(b**2 - a * c, 0.0)) / a
    return Interval(numerator / denominator, b / a - half, b / a + half)


def _quantile(n: int) -> float:
    return float(student_t.ppf((1 + LEVEL) / 2, n - 1))


@dataclass(frozen=True)
class Summary:
    """One method over its seeds, compared with the baseline's same seeds.

    difference: of mAP50-95 to the baseline's, paired by seed; None for the baseline itself, and without common seeds.
    gap_closed: the part of the gap between baseline and teacher that the method closes; None if there is no gap.
    against_native: the difference to Ultralytics' own distillation, likewise. improved: how many of the `pairs` common
    seeds are better than the baseline's.
    """

    method: str
    is_baseline: bool
    rows: tuple[LedgerRow, ...]
    difference: Interval | None
    gap_closed: Interval | None
    against_native: Interval | None
    improved: int
    pairs: int

    @property
    def deviation(self) -> float | None:
        """Return the standard deviation of mAP50-95 over seeds; None if there is one seed."""
        return stdev(row.map for row in self.rows) if len(self.rows) > 1 else None

    @property
    def d_pred(self) -> float | None:
        """Return the mean of D_pred over the rows that have it."""
        values = [row.d_pred for row in self.rows if row.d_pred is not None]
        return fmean(values) if values else None

    @property
    def images_per_second(self) -> float:
        """Return the mean of the rows' images per second."""
        return fmean(row.images_per_second for row in self.rows)

    @property
    def verdict(self) -> str:
        """Return the verdict as text; `better` or `worse` only if the difference's interval excludes 0."""
        if self.is_baseline:
            return "baseline"
        if self.difference is None:
            return "no common seed with the baseline"
        if self.difference.low is None:
            return "one seed: nothing to say"
        if not self.difference.excludes_zero:
            return "no clear difference"
        return "better" if self.difference.mean > 0 else "worse"


def summarize(
    rows: Sequence[LedgerRow], baseline: str | None, native: str | None, teachers: Sequence[LedgerRow]
) -> list[Summary]:
    """Return each method's summary, in order of first appearance.

    rows: at most one for each method and seed. baseline, native: the names of the baseline and of Ultralytics' own
    distillation among the methods. teachers: the rows that hold teachers' scores; each method's gap is that to its own
    teacher.
    """
    teacher_scores = {teacher.hash: teacher.map for teacher in teachers}
    baseline_scores, native_scores = _scores_by_seed(rows, baseline), _scores_by_seed(rows, native)
    summaries = []
    for method in dict.fromkeys(row.method for row in rows):
        method_rows = tuple(sorted((row for row in rows if row.method == method), key=lambda row: row.seed))
        reference = baseline_scores if method != baseline else {}
        differences = _differences(method_rows, reference)
        to_native = _differences(method_rows, native_scores) if method not in (baseline, native) else []
        summaries.append(
            Summary(
                method=method,
                is_baseline=method == baseline,
                rows=method_rows,
                difference=interval(differences) if differences else None,
                gap_closed=_gap_closed(method_rows, reference, teacher_scores.get(method_rows[0].teacher_row)),
                against_native=interval(to_native) if to_native else None,
                improved=sum(difference > 0 for difference in differences),
                pairs=len(differences),
            )
        )
    return summaries


def _scores_by_seed(rows: Sequence[LedgerRow], method: str | None) -> dict[int, float]:
    return {row.seed: row.map for row in rows if row.method == method}


def _differences(rows: Sequence[LedgerRow], reference: Mapping[int, float]) -> list[float]:
    """Return the differences of rows to a reference's scores, for the seeds that both have."""
    return [row.map - reference[row.seed] for row in rows if row.seed in reference]


def _gap_closed(rows: Sequence[LedgerRow], reference: Mapping[int, float], teacher: float | None) -> Interval | None:
    """Return which part of the gap between a reference's scores and the teacher's score is closed by rows.

    None if the teacher has no score, if there are no common seeds, and if the teacher is not better.
    """
    if teacher is None:
        return None
    gaps = [teacher - reference[row.seed] for row in rows if row.seed in reference]
    return ratio(_differences(rows, reference), gaps) if gaps and fmean(gaps) > 0 else None
