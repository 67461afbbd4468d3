"""The validated configuration of a distillation: the types and ranges of yolokd's own keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from yolokd.config.arguments import as_list
from yolokd.config.schedule import Schedule
from yolokd.errors import UserError

MAX_UNLABELLED_RATIO = 16  # ours: with more, a batch would hardly hold labelled images

Precision: TypeAlias = Literal["auto", "fp32", "bf16", "fp16"]
AdapterKind: TypeAlias = Literal["conv", "identity_if_equal"]


ClassName = Annotated[str, Field(min_length=1)]
Gain = Annotated[float, Field(ge=0, allow_inf_nan=False)]


METHOD_SETTINGS = ("gain", *Schedule.model_fields)  # every method has these, beside its own constants


class MethodConfig(BaseModel):
    """One method of a composition: its gain, the gain's schedule, and its constants."""

    model_config = ConfigDict(frozen=True)
    name: str
    gain: Gain
    schedule: Schedule
    constants: dict[str, Any]

    def flat(self, balanced: bool) -> dict[str, Any]:
        """Return flat keys (`dfd.alpha`), as a user would write them; without the gain if the gains are balanced."""
        values = {"gain": self.gain, **self.schedule.model_dump(), **self.constants}
        return {f"{self.name}.{k}": v for k, v in values.items() if not (balanced and k == "gain")}


class DistillationConfig(BaseModel):
    """Validated values of yolokd's own keys: what a run distils from, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    teacher: str | tuple[str, ...] | None
    teachers: Literal["stages", "ensemble"]
    levels: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None
    stages: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] | None
    method: str
    balance: Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["off"]
    level_weights: Literal["confidence", "uniform"]
    level_floor: Annotated[float, Field(ge=0, le=1)]
    adapter: AdapterKind
    check_teacher: bool
    report: bool
    teacher_precision: Precision
    teacher_imgsz: Annotated[int, Field(ge=32)] | None
    teacher_compile: bool
    teacher_channels: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | None
    probe: Annotated[int, Field(ge=1)]
    unlabelled: str | None
    unlabelled_ratio: Annotated[float, Field(gt=0, le=MAX_UNLABELLED_RATIO)]
    classes_map: Annotated[dict[ClassName, ClassName], Field(min_length=1)] | None
    trust: bool
    force: bool
    method_configs: tuple[MethodConfig, ...]

    def flat(self) -> dict[str, Any]:
        """Return flat `key: value` pairs, as a user would write them."""
        settings = self.model_dump(exclude={"method_configs"})
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
        for method in self.method_configs:
            values |= method.flat(self.balance != "off")
        return values

    @property
    def teacher_files(self) -> tuple[str, ...]:
        """Return the paths of all teachers, weakest first."""
        return teacher_files(self.teacher)

    def starts(self, epochs: float) -> tuple[float, ...]:
        """Return the epoch at which each teacher starts: as given, or evenly spread over a training of `epochs`."""
        count = len(self.teacher_files)
        if self.teachers == "ensemble":
            return (0.0,) * count
        return (0.0, *(self.stages if self.stages is not None else (epochs * k / count for k in range(1, count))))

    def stage_number(self, epoch: float, epochs: float) -> int:
        """Return the number, from 0, of the last teacher that has started at `epoch` of a training of `epochs`."""
        return sum(start <= epoch for start in self.starts(epochs)) - 1

    def factors(self, epoch: float, epochs: float) -> list[float]:
        """Return the factor, in 0..1, of each method's schedule at `epoch` of `epochs`, in the stage of its teacher."""
        number, bounds = self.stage_number(epoch, epochs), [*self.starts(epochs), epochs]
        start, end = bounds[number], min(bounds[number + 1], epochs)
        return [method.schedule.factor(epoch - start, end - start) for method in self.method_configs]


OWN_KEYS = frozenset(DistillationConfig.model_fields) - {
    "method_configs"
}  # of `yolokd train`, beside `student` and constants


def normalize_teachers(given: object) -> object:
    """Return one path unchanged and several as a tuple; `[weak.pt, strong.pt]` as text counts as several.

    Raises UserError for an empty list and for a teacher that is named twice.
    """
    if isinstance(given, str) and given.startswith("[") and given.endswith("]"):
        given = as_list(given)
    if isinstance(given, list | tuple):
        if len(set(given)) < len(given) or not given or "" in given:
            raise UserError(f"teacher={given}", "is empty or names one twice", "name each once, weakest first")
        return given[0] if len(given) == 1 else tuple(given)
    return given


def teacher_files(given: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return a normalized `teacher` value (None, a path, a tuple of paths) as a tuple of paths, weakest first."""
    return (given,) if isinstance(given, str) else given or ()
