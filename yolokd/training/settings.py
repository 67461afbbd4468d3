"""Ultralytics' settings of a run, checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from ultralytics.cfg import get_cfg, get_save_dir
from ultralytics.utils import LOGGER
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import parse_device, select_device

from yolokd.config.defaults import defaults
from yolokd.config.schema import DistillationConfig, normalize_teachers
from yolokd.config.train_settings import check_types
from yolokd.data.mixed import unlabelled_count
from yolokd.errors import UserError, first_line
from yolokd.models.checkpoint import check_path, student_task
from yolokd.models.model_objects import as_paths
from yolokd.models.tasks import TASKS
from yolokd.models.teachers.backbone import is_backbone, with_absolute_weights
from yolokd.runtime.distributed import WORLD_SIZE
from yolokd.runtime.files import check_output_folder, check_project

BYTES_PER_PIXEL = 12 + 4 * 16 / 4 + 4 * 32 / 16  # ours: of the image and of the two first maps of a yolov8n, float32
PATH_KEYS = ("teacher", "student", "model", "data", "pretrained", "distill_model", "unlabelled")


def with_absolute_paths(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a run with absolute paths of files, so that it can be repeated from any folder.

    Teachers that are model objects are saved to files first. Names that are no files stay as they are: Ultralytics
    downloads yolov8l.pt, and brings coco8.yaml and yolov8n.yaml along.
    """
    paths = {key: keys[key] for key in PATH_KEYS if key in keys}
    if "teacher" in paths:
        paths["teacher"] = normalize_teachers(as_paths(paths["teacher"], "teacher"))
    # No other key may name a folder: `shapes` is a data set, also where there is a folder of that name.
    return dict(keys) | {key: _absolute(value, folders=key == "unlabelled") for key, value in paths.items()}


def _absolute(value: Any, folders: bool) -> Any:
    if isinstance(value, tuple):
        return [_absolute(item, folders) for item in value]
    if not isinstance(value, str | Path):
        return value
    if is_backbone(value):
        return with_absolute_weights(str(value))
    return os.path.abspath(value) if os.path.isfile(value) or (folders and os.path.isdir(value)) else value


def training_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a new run with defaults filled in; `student` becomes Ultralytics' `model`.

    Raises UserError if both are given.
    """
    if keys.get("student") and keys.get("model"):
        raise UserError("student, model", "name the same setting", "give one of the two")
    student = keys.get("student") or keys.get("model") or defaults()["student"]
    rest = {k: v for k, v in keys.items() if k not in {"student", "model"}}
    if rest.get("data") is None:
        rest["data"] = data = TASKS[student_task(student, bool(keys.get("trust")))].shapes
        LOGGER.info(f"data: none is given, so `{data}` is used, a small set of drawn shapes (data=… names yours)")
    return rest | {"model": str(student) if isinstance(student, Path) else student}


def check_device(device: object) -> str:
    """Return Ultralytics' name of a device.

    Raises UserError if this machine has no such device.
    """
    try:
        name = str(parse_device("" if device is None else device))
        selected = select_device(name, verbose=False)
    except (TypeError, ValueError, SyntaxError, AssertionError) as e:
        problem = "this machine has no such device" if "CUDA" in str(e) else first_line(e)
        raise UserError(f"device={device}", problem, "give one that is here, for example device=cpu") from e
    if selected.type == "cpu" and name not in {"", "cpu"}:  # Ultralytics silently takes the CPU
        raise UserError(f"device={device}", "this machine has no such device", "give one that it has, or device=cpu")
    return name


def check_settings(settings: Mapping[str, Any], config: DistillationConfig) -> Any:
    """Return Ultralytics' settings as its own object.

    Raises UserError for what Ultralytics would refuse only after it has written files, and for what does not work with
    a teacher.
    """
    check_types({k: v for k, v in settings.items() if k != "model"})
    try:
        args = get_cfg(overrides={k: v for k, v in settings.items() if k != "model"})
        args.imgsz = check_imgsz(args.imgsz, max_dim=1)  # [640, 480] means the larger one in a training
    except (TypeError, ValueError, SyntaxError, AssertionError) as e:
        raise UserError("settings", first_line(e), "see Ultralytics' train settings") from e
    devices = check_device(args.device)
    save_dir = get_save_dir(args)
    check_path(save_dir, "project")
    check_project(save_dir, "save_dir" if settings.get("save_dir") else "project")
    check_output_folder(save_dir, "save_dir")
    processes = max(WORLD_SIZE, len(devices.split(",")))
    if processes > 1 and args.batch < processes:
        raise UserError(f"batch={args.batch}", f"leaves nothing to some of {processes} devices", "give a larger one")
    images = images_per_batch(config, args.batch)
    check_memory("imgsz", args.imgsz, images, devices)
    if args.quantize == 8 and find_spec("modelopt") is None:
        problem = "trains with ModelOpt's fake quantizers, which are not installed"
        raise UserError("quantize=8", problem, "pip install 'yolokd[int8]'")
    if not config.method_configs:
        return args
    if args.distill_model:
        raise UserError("distill_model", "is Ultralytics' own distillation", "use teacher=, or drop the teacher")
    if args.compile:
        raise UserError(f"compile={args.compile}", "does not work with a teacher", "drop compile")
    if config.teacher_compile and args.multi_scale:
        problem = f"compiles for one image size, and multi_scale={args.multi_scale} changes it"
        raise UserError("teacher_compile=True", problem, "drop one of the two")
    if args.batch < 1:
        raise UserError(f"batch={args.batch}", "AutoBatch does not count the teacher's memory", "give batch=16, say")
    if config.unlabelled and args.rect:
        problem = "gives each batch the shape of its labelled images, which unlabelled ones do not have"
        raise UserError("rect=True", problem, "drop rect, or unlabelled")
    if config.teacher_imgsz is not None:
        check_memory("teacher_imgsz", config.teacher_imgsz, images, devices)
    return args


def images_per_batch(config: DistillationConfig, labelled: int) -> int:
    """Return how many images a batch with `labelled` labelled ones holds."""
    return labelled + (unlabelled_count(labelled, config.unlabelled_ratio) if config.unlabelled else 0)


def check_memory(key: str, imgsz: int, batch: float, devices: str) -> None:
    """Raise UserError if the feature maps of a batch of square images cannot fit into the device's memory.

    key: the setting that gives `imgsz`, in pixels. batch: of images; below 1, Ultralytics chooses it. devices: as
    `check_device` returns them.
    """
    first = devices.split(",")[0]
    if first.isdigit():
        memory = torch.cuda.get_device_properties(int(first)).total_memory
    else:
        memory = psutil.virtual_memory().total
    needed = max(int(batch), 1) * imgsz**2 * BYTES_PER_PIXEL
    if needed > memory:
        images = max(int(batch), 1)
        problem = (
            f"takes more than {needed / 2**30:,.0f} GiB of memory with {images} images in a batch; "
            f"there are {memory / 2**30:.0f}"
        )
        raise UserError(f"{key}={imgsz}", problem, "give a smaller image size or a smaller batch")
