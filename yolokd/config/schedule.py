"""The schedule of a method's gain over the epochs of a teacher."""

from __future__ import annotations

from math import cos, pi
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Epochs = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Schedule(BaseModel):
    """The factor by which a method's gain is multiplied, as a function of the epoch.

    The factor rises linearly from 0 to 1 over `warmup` epochs (as in FRS), then follows the curve `schedule` until
    epoch `end`, and is 0 from there on. `constant` stays at 1, as in the papers; `linear` and `cosine` fall to 0 at
    `end`. end=None means the last epoch. The default, `cosine`, is our choice: it gave better students
    (runs/reference/compare).

    Several teachers work one after the other, each in its stage of the training. Epochs count from the start of the
    stage, and end=None means the last epoch of the stage: so every teacher gets a whole schedule.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Epochs = 0.0
    end: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def factor(self, epoch: float, epochs: float) -> float:
        """Return the factor, in 0..1, at `epoch` of a stage of `epochs` epochs; both may be fractions.

        >>> [Schedule(schedule="linear", warmup=2.0).factor(e, 10) for e in (0, 1, 2, 6, 10)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
        """
        end = epochs if self.end is None else self.end
        if epoch >= end:
            return 0.0
        if epoch < self.warmup:
            return epoch / self.warmup
        progress = (epoch - self.warmup) / (end - self.warmup)
        return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + cos(pi * progress)) / 2}[self.schedule]
