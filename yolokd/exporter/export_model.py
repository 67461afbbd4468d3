"""`yolokd export`: Ultralytics' exporter, its file made valid and signed, and the check of what it computes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.engine.exporter import export_formats
from ultralytics.nn.modules.head import Detect
from ultralytics.utils import LOGGER, checks

from yolokd.config.arguments import did_you_mean
from yolokd.config.ultralytics_keys import DEPRECATED
from yolokd.data.dataset import data_file, validation_images
from yolokd.errors import UserError, first_line
from yolokd.exporter.agreement import Thresholds
from yolokd.exporter.onnx_detector import precision_of
from yolokd.exporter.parity import ExportReport, verify
from yolokd.models.checkpoint import load_model
from yolokd.patches.patched import patched
from yolokd.patches.safe_loading import safe_loading
from yolokd.runtime.files import atomic_path


def export(model: str | Path, *, data: str | None = None, trust: bool = False, **kwargs: Any) -> ExportReport:
    """Export a checkpoint with Ultralytics' arguments (`format="onnx"` where not given) and check the result.

    An ONNX file is compared with the checkpoint on validation images of `data`, by default the data set that the
    checkpoint was trained on; the table is printed and written beside the file as `NAME.parity.json`. The report says
    `passed=False` where they differ. `trust=True` lifts the restrictions on loading the checkpoint.
    Raises UserError for a missing or broken checkpoint, a missing data set, and arguments that Ultralytics rejects.

        report = export("runs/detect/train/weights/best.pt", dynamic=True)
        print(report.path, report.passed)
    """
    options = kwargs | {"format": str(kwargs.get("format", "onnx")).lower()}
    args = _checked(options)
    module, checkpoint = load_model(model, "model", trust)
    if args.format != "onnx":
        path = _export(module, options | ({"data": data_file(data)} if data else {}), trust)
        LOGGER.info(f"{path}: parity with the checkpoint is checked for format=onnx only")
        return ExportReport(path=path)
    _require_detector(module, model)
    source = _data(data, checkpoint)
    images = validation_images(source)
    # Only INT8 calibration reads `data`: elsewhere it would but put a local path into the file's metadata.
    path = _export(module, options | ({"data": source} if args.quantize == 8 else {}), trust)
    finish(path, module)
    if args.quantize == 8:
        LOGGER.info(f"{path}: parity with the checkpoint is checked for float32 and float16 only")
        return ExportReport(path=path)
    thresholds = Thresholds(0.25 if args.conf is None else args.conf, args.iou, args.agnostic_nms)
    return verify(path, module, images, thresholds)


def _checked(options: Mapping[str, Any]) -> Any:
    known = DEFAULT_CFG_DICT.keys() | DEPRECATED
    for key in options:
        if key not in known:
            raise UserError(
                key, "no such export argument", did_you_mean(key, known) or "see Ultralytics' export settings"
            )
    formats = export_formats()["Argument"][1:]
    if options["format"] not in formats:
        cure = did_you_mean(options["format"], formats) or f"one of: {', '.join(formats)}"
        raise UserError(f"format={options['format']}", "no such format", cure)
    try:
        return get_cfg(overrides={"batch": 1, "data": None, "device": None, **options})
    except (SyntaxError, TypeError, ValueError) as e:
        raise UserError("export", first_line(e), "see Ultralytics' export settings") from e


def _require_detector(module: nn.Module, name: str | Path) -> None:
    if getattr(module, "task", None) != "detect" or not isinstance(module.model[-1], Detect):  # type: ignore[index]
        raise UserError(f"model={name}", f"is no YOLO detector but {type(module).__name__}", "give a detection model")


def _export(module: nn.Module, options: Mapping[str, Any], trust: bool) -> Path:
    try:
        with safe_loading(trust), patched(checks, "AUTOINSTALL", False):
            return Path(YOLO(module.pt_path).export(**options))
    except ImportError as e:
        raise UserError(f"format={options['format']}", f"needs {e.name or e}", f"pip install {e.name or ''}") from e
    except (AssertionError, SyntaxError, TypeError, ValueError) as e:
        raise UserError(f"format={options['format']}", first_line(e), "see Ultralytics' export settings") from e


def _data(data: str | None, checkpoint: Mapping[str, Any]) -> str:
    chosen = data or checkpoint.get("train_args", {}).get("data")
    if not chosen:
        raise UserError("data", "the checkpoint names no data set to check parity on", "give data=path/to/data.yaml")
    return data_file(chosen)


def finish(path: Path, module: nn.Module) -> None:
    """Make a fresh ONNX file valid, and write into its metadata what yolokd knows of the checkpoint, if it made it."""
    graph = onnx.load(path)
    if precision_of(graph) == "float16":
        # The float16 converter appends its casts at the end, an order that ONNX forbids and ONNX Runtime forgives.
        OnnxModel(graph).topological_sort()
    own = _provenance(getattr(module, "yolokd", None))
    onnx.helper.set_model_props(graph, {entry.key: entry.value for entry in graph.metadata_props} | own)
    with atomic_path(path) as temporary:
        onnx.save(graph, temporary)


def _provenance(known: object) -> dict[str, str]:
    if not isinstance(known, dict):
        return {}
    teacher = known.get("teacher")
    name = teacher.get("file") if isinstance(teacher, dict) else teacher
    return {"teacher": str(name), "method": str(known.get("method")), "yolokd": json.dumps(known, default=str)}
