"""An estimate of how long a comparison still takes."""

from __future__ import annotations


class TimeLeft:
    """Estimates the time that is left from the epochs that this command has trained.

    total: the epochs of all runs. done: those that earlier commands have trained. now: the time in seconds.

    >>> left = TimeLeft(total=12, done=2, now=0)
    >>> left.describe(done=2, now=60), left.describe(done=5, now=180), left.describe(done=5, now=240)
    ('', 'about 7 min left', 'about 6 min left')
    """

    def __init__(self, total: int, done: int, now: float) -> None:
        self._total, self._first, self._done, self._started = total, done, done, now
        self._end: float | None = None  # the estimated time of the end; None before the first epoch

    def describe(self, done: int, now: float) -> str:
        """Return the time that is left, as text; empty before the first epoch. done: the epochs of all runs."""
        if done > self._done:
            self._done = done
            self._end = now + (now - self._started) / (done - self._first) * (self._total - done)
        if self._end is None:
            return ""
        minutes = max(self._end - now, 0) / 60
        if minutes < 1:
            return "less than a minute left"
        return f"about {minutes:.0f} min left" if minutes < 100 else f"about {minutes / 60:.1f} h left"
