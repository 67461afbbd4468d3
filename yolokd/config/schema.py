"""The validated configuration of a distillation: what yolokd's own keys mean."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from yolokd.config.schedule import Schedule
from yolokd.errors import UserError

Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]


Gain = Annotated[float, Field(ge=0, allow_inf_nan=False)]


SETTINGS = ("gain", *Schedule.model_fields)  # that every method has, beside its own constants


class MethodConfig(BaseModel):
    """One method of a composition, with its own gain, the gain's schedule, and constants."""

    model_config = ConfigDict(frozen=True)
    name: str
    gain: Gain
    schedule: Schedule
    constants: dict[str, Any]

    def flat(self, balanced: bool) -> dict[str, Any]:
        """As a user would write it; balanced gains are none of the user's."""
        own = {"gain": self.gain, **self.schedule.model_dump(), **self.constants}
        return {f"{self.name}.{k}": v for k, v in own.items() if not (balanced and k == "gain")}


class DistillationConfig(BaseModel):
    """What a run distils from and how: yolokd's own keys, validated."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    teacher: str | tuple[str, ...] | None
    stages: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None
    method: str
    balance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["off"]
    level_weights: Literal["confidence", "uniform"]
    check_teacher: bool
    teacher_precision: Precision
    teacher_imgsz: Annotated[int, Field(ge=32)] | None
    teacher_compile: bool
    probe: Annotated[int, Field(ge=1)]
    trust: bool
    force: bool
    method_configs: tuple[MethodConfig, ...]

    def flat(self) -> dict[str, Any]:
        """The same as plain `key: value` pairs, as a user would write them."""
        own = {
            k: list(v) if isinstance(v, tuple) else v for k, v in self.model_dump(exclude={"method_configs"}).items()
        }
        for part in self.method_configs:
            own |= part.flat(self.balance != "off")
        return own

    @property
    def teachers(self) -> tuple[str, ...]:
        """All teachers, weakest first."""
        return teacher_files(self.teacher)

    def starts(self, epochs: float) -> tuple[float, ...]:
        """The epoch at which each teacher takes over: as given, or evenly spread over a training of `epochs`."""
        count = len(self.teachers)
        return (0.0, *(self.stages if self.stages is not None else (epochs * k / count for k in range(1, count))))


OWN_KEYS = frozenset(DistillationConfig.model_fields) - {
    "method_configs"
}  # of `yolokd train`, beside `student` and constants


def normalize_teachers(given: object) -> object:
    """One path as it is; several, also as the command line gives them (`[weak.pt, strong.pt]`), as a tuple."""
    if isinstance(given, str) and given.startswith("[") and given.endswith("]"):
        given = [word.strip().strip("'\"") for word in given[1:-1].split(",")]
    if isinstance(given, list | tuple):
        if len(set(given)) < len(given) or not given or "" in given:
            raise UserError(f"teacher={given}", "is empty or names one twice", "name each once, weakest first")
        return given[0] if len(given) == 1 else tuple(given)
    return given


def teacher_files(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Of none, one or several teachers, as `normalize_teachers` leaves them, all, weakest first."""
    return (given,) if isinstance(given, str) else given or ()
