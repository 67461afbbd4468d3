"""Checks that an exported file gives the same results as its checkpoint, on real images of every size it takes."""

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
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from ultralytics.nn.autobackend import check_class_names
from ultralytics.utils import LOGGER

from yolokd.data.dataset import Image, as_batch
from yolokd.errors import first_line
from yolokd.exporter.agreement import (
    LIMITS,
    Limits,
    OutputLayout,
    PredictionPair,
    Thresholds,
    image_outputs,
    postprocess,
    relative_errors,
    worst_match,
)
from yolokd.exporter.backend_detector import BackendDetector
from yolokd.exporter.onnx_detector import OnnxDetector, precision_of
from yolokd.exporter.staging import record_path
from yolokd.models.tasks import task_of
from yolokd.runtime.console import make_console
from yolokd.runtime.files import atomic_path, sha256

OWN_HEADINGS = {"segment": "worst mask IoU", "pose": "worst keypoint"}  # of the column `worst_own`, by task


class ParityRow(BaseModel):
    """The result of the check at one batch size and image size, over `images` images.

    raw, scores: relative L2 errors of all outputs and of the scores alone. worst_iou: the lowest IoU of any detection
    with its match in the other runtime. worst_own: the lowest agreement of masks or keypoints of a match, see
    `agreement.own_agreement`; 1 for other tasks.
    """

    model_config = ConfigDict(frozen=True)
    batch: int
    height: int
    width: int
    images: int
    raw: float
    scores: float
    torch_detections: int
    file_detections: int
    worst_iou: float
    worst_own: float
    passed: bool


class ExportReport(BaseModel):
    """The result of an export.

    path: the exported file. parity: the JSON file with the result of the check. precision: whose limits count. rows:
    one per input size. problem: why the file could not be checked. task: the model's. conf: the score above which
    detections were compared.
    """

    model_config = ConfigDict(frozen=True)
    path: Path
    parity: Path | None = None
    precision: str = "float32"
    rows: tuple[ParityRow, ...] = ()
    passed: bool = True
    problem: str | None = None
    task: str = "detect"
    conf: float = 0.25

    def moved(self, source: Path, target: Path) -> ExportReport:
        """Return the report after its files have been moved from one folder to another."""
        parity = self.parity and target / self.parity.relative_to(source)
        return self.model_copy(update={"path": target / self.path.relative_to(source), "parity": parity})


def verify(
    path: Path, module: nn.Module, images: Sequence[Image], thresholds: Thresholds, precision: str | None = None
) -> ExportReport:
    """Compare a file from Ultralytics' exporter with the PyTorch model that it was exported from.

    images: (H, W, C) uint8, as OpenCV reads them. Raw outputs and detections must agree within LIMITS at each batch
    size and image size that the file claims to take. precision: a key of LIMITS; None for that of an ONNX file's
    weights. Writes the result beside the file. A wrong or broken file raises no error; the report says `passed=False`.
    """
    rows, problem, layout = list[ParityRow](), None, _layout(module)
    try:
        if path.suffix == ".onnx":
            graph = onnx.load(path)
            precision = precision or precision_of(graph)
            onnx.checker.check_model(graph, full_check=True)
        rows = _compare_runtimes(path, module, layout, images, thresholds, LIMITS[precision or "float32"])
    except Exception as e:  # runtimes raise errors of many types; each means that the file is wrong
        problem = f"{type(e).__name__}: {first_line(e)}"
    passed = problem is None and all(row.passed for row in rows)
    report = ExportReport(
        path=path,
        parity=record_path(path),
        precision=precision or "float32",
        rows=tuple(rows),
        passed=passed,
        problem=problem,
        task=layout.task,
        conf=thresholds.conf,
    )
    _write_json(report, record_path(path))
    return report


def _layout(module: Any) -> OutputLayout:
    """Return what the rows of a model's output mean."""
    task, head = task_of(module), module.model[-1]
    assert task is not None
    return OutputLayout(task.name, len(module.names), tuple(getattr(head, "kpt_shape", (0, 0))))


def _compare_runtimes(
    path: Path,
    module: nn.Module,
    layout: OutputLayout,
    images: Sequence[Image],
    thresholds: Thresholds,
    limits: Limits,
) -> list[ParityRow]:
    """Run PyTorch and the file's own runtime at every input size of the file; return one row for each size."""
    exported = OnnxDetector(path) if path.suffix == ".onnx" else BackendDetector(path)
    if exported.names != check_class_names(module.names) or exported.stride != int(max(module.stride)):  # type: ignore[arg-type]
        raise ValueError(f"class names or stride differ from the checkpoint's: {exported.names}, {exported.stride}")
    max_det, chooses_boxes = _max_detections(exported), exported.chooses_boxes
    reference = _reference_model(module, exported.end2end, max_det)

    def predict(batch: Tensor) -> Iterator[PredictionPair]:
        outputs = image_outputs(reference(batch)[0], exported.end2end), image_outputs(exported(batch), chooses_boxes)
        for expected, actual in zip(*outputs, strict=True):
            yield postprocess(expected, layout, thresholds, max_det), postprocess(actual, layout, thresholds, max_det)

    with torch.inference_mode():
        return [
            _make_row(
                shape,
                [pair for batch in _batches(images, *shape) for pair in predict(batch)],
                layout,
                limits,
                thresholds.conf,
            )
            for shape in _input_shapes(exported, reference)
        ]


def _max_detections(exported: OnnxDetector | BackendDetector) -> int:
    """Return how many detections a model can give for one image."""
    if not exported.chooses_boxes:
        return 300
    # The file does not always state its number of rows, so run it once.
    return exported(torch.zeros(exported.batch, exported.channels, exported.height, exported.width))[0].shape[1]


def _reference_model(module: nn.Module, end2end: bool, max_det: int) -> Any:
    """Return a fused float32 copy of the model that chooses its boxes as the exported model does.

    max_det: the number of boxes that an end-to-end model gives.
    """
    reference: Any = deepcopy(module).float().eval()
    reference.end2end = end2end
    reference.fuse(verbose=False)
    reference.model[-1].max_det = max_det
    return reference


def _input_shapes(exported: OnnxDetector | BackendDetector, reference: Any) -> list[tuple[int, int, int]]:
    """Return each (batch, height, width) to check: one for a static file, two batch sizes at two heights if dynamic."""
    height, width = exported.height, exported.width
    if not exported.dynamic:
        return [(exported.batch, height, width)]
    # An embedded NMS is unrolled over the batch: it takes at most as many images as it was exported for.
    batch_sizes = sorted({1, min(exported.batch, 3) if exported.embeds_nms else 3})
    return [(n, side, width) for side in (height, _second_height(height, width, reference)) for n in batch_sizes]


def _second_height(height: int, width: int, reference: Any) -> int:
    """Return half the height, rounded up to a multiple of the stride; or one stride more than the height.

    The larger height is for end-to-end heads that have fewer anchors than output rows at half the height.
    """
    strides = [int(stride) for stride in reference.stride]
    step, head = max(strides), reference.model[-1]
    half = ceil(height / 2 / step) * step
    too_few = head.end2end and sum((half // stride) * (width // stride) for stride in strides) < head.max_det
    return height + step if too_few or half == height else half


def _batches(images: Sequence[Image], batch: int, height: int, width: int) -> Iterator[Tensor]:
    """Yield the images as (batch, C, height, width) in 0..1; the last batch is filled up with the first images."""
    endless = cycle(images)
    for _ in range(ceil(len(images) / batch)):
        yield as_batch(list(islice(endless, batch)), (height, width))


def _make_row(
    shape: tuple[int, int, int], pairs: Sequence[PredictionPair], layout: OutputLayout, limits: Limits, conf: float
) -> ParityRow:
    batch, height, width = shape
    raw, scores = relative_errors(pairs, layout, limits.margin)
    matches = [worst_match(*pair, layout, (height, width), conf, limits) for pair in pairs]
    iou, own = (min(values) for values in zip(*matches, strict=True))
    return ParityRow(
        batch=batch,
        height=height,
        width=width,
        images=len(pairs),
        raw=raw,
        scores=scores,
        torch_detections=sum(len(expected.detections) for expected, _ in pairs),
        file_detections=sum(len(actual.detections) for _, actual in pairs),
        worst_iou=iou,
        worst_own=own,
        # NaN fails.
        passed=raw <= limits.raw and scores <= limits.scores and iou >= limits.iou and own >= limits.own,
    )


def _write_json(report: ExportReport, path: Path) -> None:
    content = report.model_dump(mode="json", include={"passed", "problem", "rows"})
    header = {
        "file": report.path.name,
        "sha256": sha256(report.path) if report.path.is_file() else None,
        "precision": report.precision,
        "limits": LIMITS[report.precision].model_dump(),
        "versions": {library.__name__: library.__version__ for library in (torch, onnx, onnxruntime, ultralytics)},
    }
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(header | content, indent=1) + "\n", encoding="utf-8")


def print_report(report: ExportReport) -> None:
    """Print how the file's results differ from the checkpoint's, one line for each size of the input."""
    if report.problem:
        LOGGER.error(f"{report.path}: {report.problem}")
        return
    limits = LIMITS[report.precision]
    title = f"{report.path.name} ({report.precision}) compared with its checkpoint"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    raw, scores = f"outputs\nrelative L2\n≤ {limits.raw:.0e}", f"scores\nrelative L2\n≤ {limits.scores:.0e}"
    own = OWN_HEADINGS.get(report.task)
    iou = f"worst IoU\n≥ {limits.iou}" if limits.iou else "worst IoU"
    headings = ["batch", "size", raw, scores, "detections\ntorch/file", iou]
    for heading in (*headings, *([f"{own}\n≥ {limits.own}"] if own else []), "result"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            str(row.batch),
            f"{row.height}x{row.width}",
            f"{row.raw:.1e}",
            f"{row.scores:.1e}",
            f"{row.torch_detections}/{row.file_detections}",
            f"{row.worst_iou:.4f}",
            *([f"{row.worst_own:.4f}"] if own else []),
            Text("pass", "green") if row.passed else Text("FAIL", "red"),
        )
    make_console().print(table)
    if report.rows and not any(row.torch_detections for row in report.rows):
        LOGGER.warning(f"{report.path}: no detections were compared, because no score is above conf={report.conf}")
