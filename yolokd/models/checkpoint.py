"""Loading of checkpoints without running code from them."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, PositiveInt, ValidationError
from torch import nn
from ultralytics.nn import tasks

from yolokd.config.validate import validate
from yolokd.errors import UserError, describe_invalid, first_line
from yolokd.models.detector import Detector, check_attributes, describe_kind
from yolokd.models.tasks import TASKS, YOLO_TASKS, key_of, task_of
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.tensor_sizes import TensorSizeError, checked_tensor_sizes
from yolokd.runtime.console import warnings_only
from yolokd.runtime.rng import preserve_random_state

Checkpoint = dict[str, Any]


class SavedGroup(BaseModel):
    """A group of an optimizer's parameters: their indices."""

    params: list[int]


class SavedOptimizer(BaseModel):
    """The part of an optimizer's state that yolokd reads."""

    param_groups: list[SavedGroup] = []


class CheckpointContent(BaseModel):
    """The part of a checkpoint's dictionary that yolokd reads beside the model, and its types."""

    epoch: int = -1
    train_args: dict[str, Any] = {}
    optimizer: SavedOptimizer | None = None


def load_model(path: str | Path, argument: str, trust: bool = False) -> tuple[Detector, Checkpoint]:
    """Load an Ultralytics checkpoint; return the float32 model in eval mode and the checkpoint's dictionary.

    Runs no code from the file unless `trust`. argument: the key that gave the path, for error messages.
    Raises UserError if the file is missing, broken, or holds objects other than a known model.
    """
    name = f"{argument}={path}"
    check_path(path, argument)
    if Path(path).is_dir():
        raise UserError(name, "is a folder", "give a .pt checkpoint")
    if Path(path).name != str(path) and not Path(path).exists():  # Ultralytics downloads bare names only
        raise UserError(name, "no such file", "give the path of an existing .pt checkpoint")
    try:
        with safe_loading(trust), checked_tensor_sizes():
            model, ckpt = tasks.load_checkpoint(path)
    except UserError:
        raise
    except FileNotFoundError as e:
        raise UserError(name, "no such file", "give the path of an existing .pt checkpoint") from e
    except PermissionError as e:
        raise UserError(name, "cannot be read: permission denied", "get the right to read it") from e
    except (ConnectionError, OSError) as e:
        raise UserError(name, "is not on disk, and its download failed", "check the path or the network") from e
    except Exception as e:
        if isinstance(e, ModuleNotFoundError) and (e.name or "").partition(".")[0] == "modelopt":
            problem = "was trained with quantize=8, and ModelOpt is not installed"
            raise UserError(name, problem, "pip install 'yolokd[int8]'") from e
        raise UserError(name, _loading_problem(e), "give an intact Ultralytics .pt checkpoint") from e
    if not isinstance(model, nn.Module) or not isinstance(getattr(model, "yaml", None), dict):
        raise UserError(name, "holds no Ultralytics model", "give an Ultralytics .pt checkpoint")
    try:
        CheckpointContent.model_validate(ckpt, strict=True)
    except ValidationError as e:
        raise UserError(name, describe_invalid(e), "give an intact Ultralytics .pt checkpoint") from e
    return model, ckpt


def check_path(path: str | Path, argument: str) -> None:
    """Raise UserError for a path with an apostrophe: Ultralytics drops it and would look elsewhere."""
    if "'" in str(path):
        raise UserError(f"{argument}={path}", "holds an apostrophe, which Ultralytics drops", "choose another name")


def _loading_problem(error: Exception) -> str:
    if "outside the supported" in first_line(error):
        return "holds objects other than a known model, which could run code; trust=True loads them"
    return f"not a readable checkpoint{f': {error}' if isinstance(error, TensorSizeError) else ''}"


def trained_imgsz(checkpoint: Checkpoint) -> int | None:
    """Return the longer side in pixels of the images that a checkpoint was trained on; None if it does not say."""
    imgsz = checkpoint.get("train_args", {}).get("imgsz")
    sides = imgsz if isinstance(imgsz, list | tuple) else [imgsz]
    return max(sides) if sides and all(isinstance(side, int) and side > 0 for side in sides) else None


def load_teacher(path: str | None, trust: bool) -> Detector:
    """Load a teacher from a .pt checkpoint, without running it.

    Raises UserError if the file is not a detector's checkpoint.
    """
    if not str(path).endswith(".pt"):
        cure = f"did you mean {path}.pt?" if _lacks_ending(path) else "give a trained model, for example yolov8l.pt"
        raise UserError(f"teacher={path}", "is not a .pt checkpoint", cure)
    model, _ = load_model(str(path), "teacher", trust)
    check_attributes(model, f"teacher={path}")
    return model


def load_student(path: object, data: Mapping[str, Any], trust: bool) -> Detector:
    """Load a student from a .pt, or build it with random weights from a .yaml; do not run it.

    data: Ultralytics' dictionary of the data set, which gives the numbers of classes, channels and keypoints.
    Raises UserError if the model is not a YOLO of a task that can learn, or if the data set does not fit the task.
    """
    name = f"student={path}"
    if str(path).endswith((".yaml", ".yml")):
        model = _build(str(path), name, student_task(path, trust), data, trust)
    elif str(path).endswith(".pt"):
        model, _ = load_model(str(path), "student", trust)
    else:
        cure = f"did you mean {path}.yaml?" if _lacks_ending(path) else "for example yolov8n.yaml or yolov8n.pt"
        raise UserError(name, "is neither .yaml nor .pt", cure)
    task = task_of(model)
    if task is None:
        problem = f"is {describe_kind(model)}; yolokd trains YOLO and RT-DETR models"
        raise UserError(name, problem, f"give a YOLO of the tasks {', '.join(YOLO_TASKS)}, for example yolov8n.yaml")
    check_attributes(model, name)
    if str(path).endswith(".pt"):
        with preserve_random_state():  # Ultralytics will build it, too, and take the weights from the checkpoint
            _build(model.yaml, name, key_of(task), data, trust)
    return model


def student_task(path: object, trust: bool) -> str:
    """Return the key in TASKS of a student's file; "detect" if it cannot be read, which `load_student` reports."""
    file = Path(str(path))
    try:
        if file.suffix == ".pt" and file.exists():
            task = task_of(load_model(file, "student", trust)[0])
            return key_of(task) if task is not None else "detect"
        with safe_loading(trust), warnings_only():
            # A .pt that Ultralytics will download says in its name what its .yaml says.
            yaml = file.with_suffix(".yaml") if file.suffix == ".pt" else file
            head = str(tasks.yaml_model_load(yaml)["head"][-1][-2]).lower()
    except Exception:  # whatever the parser of a broken file raises
        return "detect"
    return next((name for name in TASKS if name in head), "detect")


def _build(cfg: str | dict[str, Any], name: str, task: str, data: Mapping[str, Any], trust: bool) -> Detector:
    """Build a student with random weights from the path of a .yaml, or from its content in a checkpoint."""
    if task == "pose":
        _check_keypoints(data)
    try:
        with safe_loading(trust), warnings_only():
            return TASKS[task].build(deepcopy(cfg), data)
    except FileNotFoundError as e:
        raise UserError(name, "no such file", "give a model's .yaml, for example yolov8n.yaml, or a .pt") from e
    except Exception as e:
        problem = "does not describe" if isinstance(cfg, str) else "holds a yaml that does not describe"
        raise UserError(name, f"{problem} a YOLO detector", "for example yolov8n.yaml") from e


def _check_keypoints(data: Mapping[str, Any]) -> None:
    shape = data.get("kpt_shape")
    shape = tuple(shape) if isinstance(shape, list) else shape
    cure = "say how many keypoints an object has, and how many numbers each, for example kpt_shape: [17, 3]"
    validate("data: kpt_shape", shape, tuple[PositiveInt, Literal[2, 3]], "is no shape of keypoints", cure)


def _lacks_ending(path: object) -> bool:
    """Return whether a path is the name of a model without .yaml or .pt, such as `yolov8n`."""
    return isinstance(path, str) and path.isalnum()
