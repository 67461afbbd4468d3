"""The keys of `yolokd label`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from yolokd.config.arguments import as_list, check_known
from yolokd.config.validate import as_user_error
from yolokd.errors import UserError

Share = Annotated[float, Field(ge=0, le=1)]


def _as_optional_list(value: object) -> object:
    return None if value is None else as_list(value)


class DetectionSettings(BaseModel):
    """Holds what decides, besides the weights, what a teacher detects: Ultralytics' settings of a prediction.

    The default of `conf` is ours, the others are Ultralytics'. imgsz: None for the size that the teacher trained with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    conf: Share = 0.4
    iou: Share = 0.7
    max_det: PositiveInt = 300
    classes: Annotated[list[NonNegativeInt] | None, Field(min_length=1), BeforeValidator(_as_optional_list)] = None
    imgsz: PositiveInt | None = None


class LabelSettings(DetectionSettings):
    """All keys of the command.

    source: the images. val: the .yaml whose validation images the data set gets. split: of a source that is a data set.
    batch: images at a time. copy_images: whether to copy images instead of linking them. name: of the data set's folder
    in `project`; None for the source's name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    teacher: str
    source: str
    val: str | None = None
    split: str | None = None
    batch: PositiveInt = 16
    device: Any = None
    copy_images: bool = Field(False, alias="copy")
    project: str = "runs/label"
    name: str | None = None
    trust: bool = False

    @property
    def detection(self) -> DetectionSettings:
        """Return the settings that change labels."""
        return DetectionSettings(**{key: getattr(self, key) for key in DetectionSettings.model_fields})


KEYS = {field.alias or name: field for name, field in LabelSettings.model_fields.items()}  # as the user writes them


def check_label_settings(keys: Mapping[str, Any]) -> LabelSettings:
    """Return the checked settings. Raises UserError for a missing or unknown key and for a value that is not valid."""
    check_known(keys, KEYS, "see `yolokd label --help`")
    for key, example in (("teacher", "teacher=t.pt"), ("source", "source=images/")):
        if keys.get(key) is None:
            raise UserError(key, "is missing", f"give {example}, for example")
    try:
        paths = {key: str(keys[key]) for key in ("teacher", "source", "project") if keys.get(key) is not None}
        return LabelSettings.model_validate({**keys, **paths})  # a folder may be named by a number
    except ValidationError as e:
        raise as_user_error(e, keys) from e
