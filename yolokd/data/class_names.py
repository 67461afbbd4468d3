"""What the class names of a data set or of a checkpoint must be."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

MAX_CLASSES = 10_000  # ours: at 640 pixels, the scores of that many classes take 0.3 GB for each image


def _check_name(name: str) -> str:
    name.encode()  # a lone surrogate, which no file of a run can hold, raises a ValueError
    return name


def _check_indices(names: dict[int, str]) -> dict[int, str]:
    if set(names) != set(range(len(names))):
        raise ValueError(f"must count {len(names)} classes from 0, without a gap")
    return names


# A text for each class, by its index from 0.
ClassNames: TypeAlias = Annotated[
    dict[int, Annotated[str, AfterValidator(_check_name)]],
    Field(min_length=1, max_length=MAX_CLASSES),
    AfterValidator(_check_indices),
]
