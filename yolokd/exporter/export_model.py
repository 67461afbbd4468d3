"""Exports a checkpoint with Ultralytics' exporter, completes an ONNX file, and checks the file's results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.error import URLError

import onnx
from onnxruntime.transformers.onnx_model import OnnxModel
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.engine.exporter import FP16_FORMATS, FP32_UNSUPPORTED_FORMATS, export_formats
from ultralytics.utils import LOGGER

from yolokd.config.arguments import did_you_mean
from yolokd.config.ultralytics_keys import DEPRECATED
from yolokd.data.dataset import Image, data_file, validation_images
from yolokd.errors import UserError, first_line
from yolokd.exporter.agreement import Thresholds
from yolokd.exporter.backend_detector import BackendDetector
from yolokd.exporter.calibration import write_calibration_set
from yolokd.exporter.onnx_detector import precision_of
from yolokd.exporter.parity import ExportReport, print_report, verify
from yolokd.exporter.staging import publish, staging_folder
from yolokd.models.checkpoint import load_model
from yolokd.models.origin import origin_of, record_of
from yolokd.models.tasks import TASKS, YOLO_TASKS, task_of
from yolokd.patches.no_autoinstall import no_autoinstall
from yolokd.patches.safe_loading import safe_loading

# Formats that have quantized files alone: Ultralytics turns `quantize` on by itself, after these options are made.
INT8_ONLY = FP32_UNSUPPORTED_FORMATS - FP16_FORMATS
# Our extras that install what formats need.
EXTRAS = {"openvino": "'yolokd[deploy]'", "nncf": "'yolokd[deploy]'", "modelopt": "'yolokd[int8]'"}


def export(model: str | Path, *, data: str | None = None, trust: bool = False, **kwargs: Any) -> ExportReport:
    """Export a checkpoint with Ultralytics' export arguments and check the result; the default is format="onnx".

    The file is compared with the checkpoint on validation images of `data`, by default of the data set that the
    checkpoint was trained on. The result is written beside the file as `NAME.parity.json`, and shown as a table. The
    report has `passed=False` if the two differ. An INT8 file is calibrated on training images of `data`. trust=True
    loads a checkpoint that could run code.
    Raises UserError for a missing or broken checkpoint, a missing data set, and arguments that Ultralytics rejects.

        report = export("runs/detect/train/weights/best.pt", dynamic=True)
        print(report.path, report.passed)
    """
    report = export_into(None, model, data, trust, kwargs)
    if report.parity:
        print_report(report)
    return report


def export_into(
    into: Path | None, model: str | Path, data: str | None, trust: bool, given: Mapping[str, Any]
) -> ExportReport:
    """Export and check as `export` does, without the table.

    into: the path of a checkpoint, which need not exist; the file gets its folder and name instead of the model's.
    """
    options = {**given, "format": str(given.get("format", "onnx")).lower()}
    args = _check_options(options)
    if Path(model).suffix in {".onnx", ".torchscript", ".engine"}:
        raise UserError(f"model={model}", "is an exported file already", "give the .pt that it was made from")
    module, checkpoint = load_model(model, "model", trust)
    images: list[Image] = []
    try:
        _require_detector(module, model)
        data = choose_data(data, checkpoint)
        images = validation_images(data)
    except UserError as e:
        if args.format == "onnx":
            raise
        LOGGER.info(f"the file will not be compared with the checkpoint: {e}")
    path = into or Path(module.pt_path)
    if _makes_folder(args.format) and ".pt" in str(path.absolute().parent):  # Ultralytics replaces all of them
        raise UserError(f"model={model}", "lies below a folder with .pt in its name", "rename that folder")
    with staging_folder(Path(module.pt_path), path.parent) as staging, TemporaryDirectory() as calibration:
        options |= _calibration_options(args, data, Path(calibration))
        file = _run_exporter(module, staging / path.name, options, trust)
        report = _complete_and_verify(file, module, images, args)
        # Ultralytics makes an ONNX file on the way to other formats; it would replace one that was checked.
        for by_product in {*staging.glob("*.onnx")} - {file}:
            by_product.unlink()
        publish(staging)
    return report.moved(staging, path.parent)


def _complete_and_verify(file: Path, module: nn.Module, images: Sequence[Image], args: Any) -> ExportReport:
    """Complete an ONNX file, and compare an exported file with its checkpoint if it can be run here."""
    if args.format == "onnx":
        _complete_onnx(file, module)
        return verify(file, module, images, _thresholds(args))
    if not images:
        return ExportReport(path=file)
    precision = _precision(args)
    try:
        BackendDetector(file)
    except Exception as e:  # whatever a runtime raises that is missing, or belongs to another machine
        LOGGER.warning(f"{file}: not compared with the checkpoint, since it does not run here: {first_line(e)}")
        return ExportReport(path=file, precision=precision)
    return verify(file, module, images, _thresholds(args), precision)


def _precision(args: Any) -> str:
    """Return the precision of a file that is no ONNX file, by whose limits it is compared."""
    if _is_calibrated(args):
        return "int8"
    if args.format == "torchscript":
        return "float16" if args.quantize == 16 else "float32"
    return "reduced"


def _is_calibrated(args: Any) -> bool:
    """Return whether Ultralytics will quantize the file with ranges that it measures on images."""
    return args.quantize in {8, "w8a16"} or args.format in INT8_ONLY


def _makes_folder(form: str) -> bool:
    """Return whether the files of one of Ultralytics' formats lie in a folder."""
    return str(_of_format(form, "Suffix")).startswith("_")


def _of_format(form: str, column: str) -> Any:
    """Return what Ultralytics' table of export formats says of one of them."""
    table = export_formats()
    return dict(zip(table["Argument"], table[column], strict=True))[form]


def _thresholds(args: Any) -> Thresholds:
    return Thresholds(0.25 if args.conf is None else args.conf, args.iou, args.agnostic_nms)


def _check_options(options: Mapping[str, Any]) -> Any:
    """Return the options as Ultralytics' settings object; raise UserError for a key or value that it does not take."""
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
    task = task_of(module)
    if task in (None, TASKS["rtdetr"]) or getattr(module, "task", None) != task.name:
        kind, cure = type(module).__name__, f"give a YOLO of the tasks {', '.join(YOLO_TASKS)}"
        raise UserError(f"model={name}", f"is not a YOLO detector but a {kind}", cure)


def _calibration_options(args: Any, data: str | None, folder: Path) -> dict[str, Any]:
    """Return Ultralytics' options for the images that an INT8 file is calibrated on, training images of the data set.

    folder: where links to the images are put. If the user chose `split` or `fraction`, these count.
    Raises UserError if no data set is known, or if its training images are missing.
    """
    takes_data = "data" in _of_format(args.format, "Arguments")
    # In a file that is not calibrated, it would only put a local path into the file's metadata.
    if not takes_data or not _is_calibrated(args):
        return {}
    if args.split != DEFAULT_CFG_DICT["split"] or args.fraction != DEFAULT_CFG_DICT["fraction"]:
        split = args.split if args.split != DEFAULT_CFG_DICT["split"] else "train"
        return {"data": choose_data(data, {}), "split": split}
    return {"data": str(write_calibration_set(choose_data(data, {}), folder)), "split": "train"}


def _run_exporter(module: nn.Module, checkpoint: Path, options: Mapping[str, Any], trust: bool) -> Path:
    """Run Ultralytics' exporter, which writes beside `checkpoint`; return the path of the export.

    checkpoint: the path that the exporter takes for the model's own.
    Raises UserError if it rejects an option or needs a package or program that is not installed.
    """
    try:
        with safe_loading(trust), no_autoinstall():
            model: Any = YOLO(module.pt_path)
            model.model.pt_path = str(checkpoint)
            return Path(model.export(**options))
    except ImportError as e:
        package = (e.name or "").partition(".")[0]
        problem = f"needs {package}, which is not installed" if package else first_line(e)
        cure = f"pip install {EXTRAS[package]}" if package in EXTRAS else "see Ultralytics' page on this format"
        raise UserError(f"format={options['format']}", problem, cure) from e
    except (ConnectionError, URLError) as e:  # both are OSErrors, which would be taken for a full disk
        raise UserError(
            f"format={options['format']}", f"a download failed: {first_line(e)}", "check the network"
        ) from e
    except (AssertionError, SyntaxError, TypeError, ValueError, FileNotFoundError) as e:
        raise UserError(f"format={options['format']}", first_line(e), "see Ultralytics' export settings") from e


def choose_data(data: str | None, checkpoint: Mapping[str, Any]) -> str:
    """Return the data set file to check on: the one given, or the one that the checkpoint was trained on."""
    chosen = data or checkpoint.get("train_args", {}).get("data")
    if not chosen:
        raise UserError("data", "the checkpoint names no data set", "give data=path/to/data.yaml")
    return data_file(chosen)


def _complete_onnx(path: Path, module: nn.Module) -> None:
    """Make a new ONNX file valid, and add yolokd's provenance to its metadata if yolokd trained the model."""
    graph = onnx.load(path)
    if precision_of(graph) == "float16":
        # The float16 converter appends its casts at the end; ONNX forbids this order, ONNX Runtime accepts it.
        OnnxModel(graph).topological_sort()
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    onnx.helper.set_model_props(graph, metadata | _provenance(module))
    onnx.save(graph, path)


def _provenance(module: nn.Module) -> dict[str, str]:
    """Return metadata entries on the model's origin; empty if yolokd did not train it."""
    record, origin = record_of(module), origin_of(module)
    if not record:
        return {}
    teacher = ", ".join(teacher.file for teacher in origin.teachers)
    return {"teacher": teacher, "method": origin.method, "yolokd": json.dumps(record, default=str)}
