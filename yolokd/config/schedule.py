"""A method's gain over the epochs."""

from __future__ import annotations

from math import cos, pi
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Epochs = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Schedule(BaseModel):
    """The factor of a gain: a linear ramp over `warmup` epochs (FRS's), then a shape until `end`, then nothing.

    `constant` stays at 1, as the papers' gains do, `linear` and `cosine` fall to 0 at the end; end=None is the last
    epoch. That `cosine` is the default is ours: it made better students (runs/reference/compare).
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Epochs = 0.0
    end: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def factor(self, epoch: float, epochs: float) -> float:
        """In 0..1, at a time in (fractions of) epochs from the start of a training of `epochs`.

        >>> [Schedule(schedule="linear", warmup=2.0).factor(e, 10) for e in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        end = epochs if self.end is None else self.end
        if epoch >= end:
            return 0.0
        if epoch < self.warmup:
            return epoch / self.warmup
        done = (epoch - self.warmup) / (end - self.warmup)
        return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + cos(pi * done)) / 2}[self.schedule]
