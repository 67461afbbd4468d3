"""The proof that an ONNX file computes what its checkpoint does, on real pictures, at every size that it claims."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
import ultralytics
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from ultralytics.nn.autobackend import check_class_names
from ultralytics.utils import LOGGER

from yolokd.data.dataset import Image, as_batch
from yolokd.errors import first_line
from yolokd.exporter.agreement import LIMITS, Limits, Pair, Thresholds, _agreement, _raw_errors, _view
from yolokd.exporter.onnx_detector import OnnxDetector, precision_of
from yolokd.runtime.files import atomic_path, sha256


class ParityRow(BaseModel):
    """The parity at one batch and image size, over `images` images."""

    model_config = ConfigDict(frozen=True)
    batch: int
    height: int
    width: int
    images: int
    raw: float
    scores: float
    torch_detections: int
    onnx_detections: int
    worst_iou: float
    passed: bool


class ExportReport(BaseModel):
    """What an export made: the file, the JSON file with its parity (ONNX only), and the verdict."""

    model_config = ConfigDict(frozen=True)
    path: Path
    parity: Path | None = None
    rows: tuple[ParityRow, ...] = ()
    passed: bool = True
    problem: str | None = None


def verify(path: Path, module: nn.Module, images: Sequence[Image], thresholds: Thresholds) -> ExportReport:
    """Compare an ONNX file from Ultralytics' exporter with the PyTorch model it was made of, on OpenCV's pictures.

    At each batch and image size that the file claims to take, raw outputs and detections must agree within LIMITS.
    Prints the table and writes it beside the file; never raises for a file that is wrong.
    """
    precision, rows, problem = "float32", list[ParityRow](), None
    try:
        graph = onnx.load(path)
        precision = precision_of(graph)
        onnx.checker.check_model(graph, full_check=True)
        rows = _compare(path, module, images, thresholds, LIMITS[precision])
    except Exception as e:  # whatever ONNX and ONNX Runtime raise, the file is not what was ordered
        problem = f"{type(e).__name__}: {first_line(e)}"
    record = path.with_suffix(".parity.json")
    passed = problem is None and all(row.passed for row in rows)
    report = ExportReport(path=path, parity=record, rows=tuple(rows), passed=passed, problem=problem)
    _write(report, record, precision)
    if problem:
        LOGGER.error(f"{path}: {problem}")
        return report
    _print(report, precision)
    if not any(row.torch_detections for row in rows):
        LOGGER.warning(f"{path}: nothing scores above conf={thresholds.conf}: no detections were compared")
    return report


def _compare(
    path: Path, module: nn.Module, images: Sequence[Image], thresholds: Thresholds, limits: Limits
) -> list[ParityRow]:
    exported = OnnxDetector(path)
    if exported.names != check_class_names(module.names) or exported.stride != int(max(module.stride)):  # type: ignore[arg-type]
        raise ValueError(f"class names or stride are not the checkpoint's: {exported.names}, {exported.stride}")
    most = exported.most()
    reference = _reference(module, exported.end2end, most)

    def look(batch: Tensor) -> Iterator[Pair]:
        for expected, actual in zip(reference(batch)[0], exported(batch), strict=True):
            yield _view(expected, thresholds, most), _view(actual, thresholds, most)

    with torch.inference_mode():
        return [
            _row(shape, [pair for batch in _batches(images, *shape) for pair in look(batch)], limits, thresholds.conf)
            for shape in _shapes(exported, reference)
        ]


def _reference(module: nn.Module, end2end: bool, most: int) -> Any:
    """The fused float32 model, choosing its boxes (if it does, `most` of them) as the exported one does."""
    reference: Any = deepcopy(module).float().eval()
    reference.end2end = end2end
    reference.fuse(verbose=False)
    reference.model[-1].max_det = most
    return reference


def _shapes(exported: OnnxDetector, reference: Any) -> list[tuple[int, int, int]]:
    """The (batch, height, width) to try: all that a static file takes, two batches at two sizes for a dynamic one."""
    height, width = exported.height, exported.width
    if not exported.dynamic:
        return [(exported.batch, height, width)]
    # An embedded NMS is unrolled: it takes no more pictures at once than it was exported for.
    counts = sorted({1, min(exported.batch, 3) if exported.embeds_nms else 3})
    return [(n, side, width) for side in (height, _other_height(height, width, reference)) for n in counts]


def _other_height(height: int, width: int, reference: Any) -> int:
    """Half the height; or more than it, where half leaves an end-to-end head fewer anchors than rows to fill."""
    strides = [int(stride) for stride in reference.stride]
    step, head = max(strides), reference.model[-1]
    half = ceil(height / 2 / step) * step
    too_few = head.end2end and sum((half // stride) * (width // stride) for stride in strides) < head.max_det
    return height + step if too_few or half == height else half


def _batches(images: Sequence[Image], batch: int, height: int, width: int) -> Iterator[Tensor]:
    """The images as (batch, C, height, width) in 0..1, starting over where the last batch is not full."""
    endless = cycle(images)
    for _ in range(ceil(len(images) / batch)):
        yield as_batch(list(islice(endless, batch)), (height, width))


def _row(shape: tuple[int, int, int], pairs: Sequence[Pair], limits: Limits, conf: float) -> ParityRow:
    batch, height, width = shape
    raw, scores = _raw_errors(pairs, limits.margin)
    worst = min(_agreement(*pair, conf, limits) for pair in pairs)
    return ParityRow(
        batch=batch,
        height=height,
        width=width,
        images=len(pairs),
        raw=raw,
        scores=scores,
        torch_detections=sum(len(expected.detections) for expected, _ in pairs),
        onnx_detections=sum(len(actual.detections) for _, actual in pairs),
        worst_iou=worst,
        passed=raw <= limits.raw and scores <= limits.scores and worst >= limits.iou,  # NaN fails
    )


def _write(report: ExportReport, path: Path, precision: str) -> None:
    content = report.model_dump(mode="json", include={"passed", "problem", "rows"})
    about = {
        "onnx": report.path.name,
        "sha256": sha256(report.path) if report.path.is_file() else None,
        "precision": precision,
        "limits": LIMITS[precision].model_dump() if precision in LIMITS else None,
        "versions": {library.__name__: library.__version__ for library in (torch, onnx, onnxruntime, ultralytics)},
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(about | content, indent=1) + "\n", encoding="utf-8")


def _print(report: ExportReport, precision: str) -> None:
    limits = LIMITS[precision]
    table = Table(
        title=f"{report.path.name} ({precision}) against its checkpoint", title_justify="left", box=SIMPLE_HEAD
    )
    raw, scores = f"raw rel. L2\n≤ {limits.raw:.0e}", f"its scores\n≤ {limits.scores:.0e}"
    for heading in ("batch", "size", raw, scores, "detections\ntorch/onnx", f"worst IoU\n≥ {limits.iou}", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            str(row.batch),
            f"{row.height}x{row.width}",
            f"{row.raw:.1e}",
            f"{row.scores:.1e}",
            f"{row.torch_detections}/{row.onnx_detections}",
            f"{row.worst_iou:.4f}",
            "[green]pass[/]" if row.passed else "[red]FAIL[/]",
        )
    Console().print(table)
