"""The keys of `yolokd deploy`, checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, ValidationError

from yolokd.config.arguments import as_list, check_known
from yolokd.config.validate import as_user_error
from yolokd.errors import UserError

DEFAULT_FORMATS = "onnx,onnx-float16,onnx-int8,openvino,openvino-int8,torchscript"
Names = Annotated[list[str], Field(min_length=1), BeforeValidator(as_list)]


class DeploySettings(BaseModel):
    """All keys of the command.

    data: None for the data set that the model was trained on. teacher: None for the one that its run names. limit: the
    largest loss of mAP50-95 that is accepted. imgsz: None for the size that the model was trained with. threads: None
    for as many as a training uses. save_dir: None for the model's run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    model: str
    data: str | None = None
    formats: Names = Field(default=as_list(DEFAULT_FORMATS))
    teacher: Annotated[list[str] | None, BeforeValidator(lambda v: None if v is None else as_list(v))] = None
    baseline: str | None = None
    limit: Annotated[float, Field(ge=0, le=1)] | None = None
    imgsz: PositiveInt | None = None
    split: str = "val"
    threads: PositiveInt | None = None
    save_dir: str | None = None
    trust: bool = False


def check_deploy_settings(keys: Mapping[str, Any]) -> DeploySettings:
    """Return the checked settings. Raises UserError for a missing or unknown key and for a value that is not valid."""
    known = DeploySettings.model_fields
    check_known(keys, known, "see `yolokd deploy --help`")
    if keys.get("model") is None:
        raise UserError("model", "is missing", "give model=runs/distill/train/weights/best.pt")
    try:
        return DeploySettings.model_validate({k: v for k, v in keys.items() if v is not None})
    except ValidationError as e:
        raise as_user_error(e, keys) from e
