"""Types and ranges of Ultralytics' train settings, for what Ultralytics notices only after it has written files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, create_model
from ultralytics.cfg import CFG_BOOL_KEYS, CFG_FLOAT_KEYS, CFG_FRACTION_KEYS, CFG_INT_KEYS

from yolokd.config.ultralytics_keys import OPTIMIZERS
from yolokd.config.validate import as_user_error

MAX_SEED = 2**32 - 2**16  # NumPy takes seeds below 2^32, and Ultralytics adds 1 and the number of the process
MAX_NAME_BYTES = 255  # of a file or folder on common file systems
MAX_PATH_BYTES = 4096


def _check_path_text(path: str | Path) -> str | Path:
    text = os.fsencode(path)
    if b"\0" in text:
        raise ValueError("a path cannot hold a NUL character")
    if len(text) > MAX_PATH_BYTES or any(len(part) > MAX_NAME_BYTES for part in text.split(b"/")):
        raise ValueError(f"a path has at most {MAX_PATH_BYTES} bytes, and a name in it {MAX_NAME_BYTES}")
    return path


def _check_optimizer(name: str) -> str:
    if name.lower() not in OPTIMIZERS:
        raise ValueError(f"Optimizer should be one of: {', '.join(OPTIMIZERS)}")
    return name


NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
PathText = Annotated[str | Path, AfterValidator(_check_path_text)]
Count = Annotated[int, Field(ge=1)]

# Ultralytics says of most settings which type they have. These differ, or Ultralytics says nothing of them.
SPECIAL: dict[str, Any] = {
    "angle": float,  # of other tasks; Ultralytics allows any number
    "augmentations": list[Any],
    "batch": Annotated[float, Field(ge=-1, allow_inf_nan=False)],  # -1, or a fraction of the memory: AutoBatch
    "classes": int | list[int],
    "data": PathText,
    "distill_model": PathText,
    "epochs": Count,
    "fraction": Any,  # also counts, and lists of them
    "freeze": int | list[int | str],
    "imgsz": int | str | list[int] | tuple[int, ...],
    "max_det": Count,
    "multi_scale": bool | Fraction,
    "name": PathText,
    "nbs": Count,
    "optimizer": Annotated[str, AfterValidator(_check_optimizer)],
    "pretrained": bool | PathText,
    "project": PathText,
    "save_dir": PathText,
    "save_period": int,
    "seed": Annotated[int, Field(ge=0, le=MAX_SEED)],
    "split": str,
    "time": Annotated[float, Field(gt=0, allow_inf_nan=False)],
}
TYPES: dict[str, Any] = (
    dict.fromkeys(CFG_FLOAT_KEYS, NotNegative)
    | dict.fromkeys(CFG_FRACTION_KEYS, Fraction)
    | dict.fromkeys(CFG_INT_KEYS, Annotated[int, Field(ge=0)])
    | dict.fromkeys(CFG_BOOL_KEYS, bool)
    | SPECIAL
)
FIELDS: dict[str, Any] = {key: (kind | None, None) for key, kind in TYPES.items()}  # Ultralytics says which may be None
TrainSettings = create_model("TrainSettings", __config__=ConfigDict(strict=True, extra="allow"), **FIELDS)


def check_types(settings: Mapping[str, Any]) -> None:
    """Raise UserError for the first setting whose type or range is wrong.

    >>> check_types({"epochs": 3, "name": "train"})
    >>> check_types({"seed": -1})
    Traceback (most recent call last):
    yolokd.errors.UserError: seed=-1: not a valid value (Input should be greater than or equal to 0)
    """
    try:
        TrainSettings(**settings)
    except ValidationError as e:
        raise as_user_error(e, settings) from e
