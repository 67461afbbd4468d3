"""The proof that an ONNX file computes what its checkpoint does, on real pictures, at every size that it claims."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import cycle, islice
from math import ceil
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
import ultralytics
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import pad
from torchvision.ops import box_iou
from ultralytics.nn.autobackend import check_class_names
from ultralytics.utils import LOGGER
from ultralytics.utils.nms import non_max_suppression
from ultralytics.utils.ops import xywh2xyxy

from yolokd.data import Image, as_batch
from yolokd.errors import first_line
from yolokd.files import atomic_path, sha256


class Limits(BaseModel):
    """How far apart PyTorch and ONNX Runtime may be."""

    model_config = ConfigDict(frozen=True)
    raw: float  # relative L2 of the whole output
    scores: float  # the same of the scores alone: beside box sides in pixels they hardly count in the whole
    iou: float  # least overlap of two boxes that pass for the same detection
    margin: float  # scores this close are a tie: to the threshold, or of two boxes that NMS chooses between
    ties: bool  # whether NMS may choose the other box of a tie


# float16 rounds a coordinate of 600 to a half, and moves scores by up to 0.01: enough to move small boxes and to turn a
# choice between two boxes of one object, which in float32 practically never happens.
LIMITS: Mapping[str, Limits] = MappingProxyType(
    {
        "float32": Limits(raw=1e-4, scores=1e-4, iou=0.99, margin=1e-3, ties=False),
        "float16": Limits(raw=1e-2, scores=5e-2, iou=0.95, margin=2e-2, ties=True),
    }
)


class Row(BaseModel):
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
    rows: tuple[Row, ...] = ()
    passed: bool = True
    problem: str | None = None


class Thresholds(NamedTuple):
    """The settings of NMS."""

    conf: float = 0.25
    iou: float = 0.7
    agnostic: bool = False


class View(NamedTuple):
    """What one runtime sees in one image, in comparable form."""

    raw: Tensor  # (4 + classes, anchors), or final rows (n, 6)
    candidates: Tensor  # (m, 6) before NMS: x1, y1, x2, y2, score, class
    detections: Tensor  # (n, 6) after it


Pair = tuple[View, View]  # the same image in PyTorch and in ONNX Runtime


def verify(path: Path, module: nn.Module, images: Sequence[Image], thresholds: Thresholds) -> ExportReport:
    """Compare an ONNX file from Ultralytics' exporter with the PyTorch model it was made of, on OpenCV's pictures.

    At each batch and image size that the file claims to take, raw outputs and detections must agree within LIMITS.
    Prints the table and writes it beside the file; never raises for a file that is wrong.
    """
    precision, rows, problem = "float32", list[Row](), None
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


class OnnxDetector:
    """An ONNX file of Ultralytics' in ONNX Runtime, on the CPU, and what its metadata say of it."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        meta = self.session.get_modelmeta().custom_metadata_map
        self.names: dict[int, str] = ast.literal_eval(meta["names"])
        self.stride, self.batch = int(meta["stride"]), int(meta["batch"])
        self.height, self.width = ast.literal_eval(meta["imgsz"])
        self.dynamic = any(isinstance(side, str) for side in self.input.shape)
        self.end2end = meta["end2end"] == "True"
        self.embeds_nms = ast.literal_eval(meta["args"]).get("nms") is True

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, C, H, W) float32 in 0..1 -> (B, 4 + classes, anchors), or final rows (B, n, 6); float32."""
        # float16 files made on a GPU take and give float16.
        dtype = np.float16 if "float16" in self.input.type else np.float32
        return torch.from_numpy(self.session.run(None, {self.input.name: pictures.numpy().astype(dtype)})[0]).float()

    def most(self) -> int:
        """How many detections a picture can have."""
        if not self.end2end and not self.embeds_nms:
            return 300
        # The file does not always tell how many rows it gives: it has to be tried.
        return self(torch.zeros(self.batch, self.input.shape[1], self.height, self.width)).shape[1]


def _compare(
    path: Path, module: nn.Module, images: Sequence[Image], thresholds: Thresholds, limits: Limits
) -> list[Row]:
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


def _view(raw: Tensor, thresholds: Thresholds, most: int) -> View:
    conf, iou, agnostic = thresholds
    detections = non_max_suppression(raw[None], conf, iou, agnostic=agnostic, max_det=most)[0]
    return View(raw, raw if raw.shape[-1] == 6 else _boxes(raw, conf / 2), detections)


def _boxes(raw: Tensor, least: float) -> Tensor:
    """(4 + classes, anchors) -> (m, 6): every anchor with every class that scores above `least`, and a row of zeros.

    Two classes may tie as two boxes may. Thanks to the zeros there is always a candidate, however far from the mark.
    """
    classes, anchors = (raw[4:] > least).nonzero(as_tuple=True)
    rows = torch.cat([xywh2xyxy(raw[:4, anchors].T), raw[4 + classes, anchors, None], classes[:, None]], 1)
    return pad(rows, (0, 0, 0, 1))


def _row(shape: tuple[int, int, int], pairs: Sequence[Pair], limits: Limits, conf: float) -> Row:
    batch, height, width = shape
    raw, scores = _raw_errors(pairs, limits.margin)
    worst = min(_agreement(*pair, conf, limits) for pair in pairs)
    return Row(
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


def _raw_errors(pairs: Sequence[Pair], margin: float) -> tuple[float, float]:
    """The relative L2 distance of all outputs, and of the scores alone."""
    final = pairs[0][1].raw.shape[-1] == 6
    sides = [
        _aligned(expected.candidates, actual.raw, margin) if final else (expected.raw.T, actual.raw.T)
        for expected, actual in pairs
    ]
    expected, actual = (torch.cat(side).double() for side in zip(*sides, strict=True))
    scores = slice(4, 5 if final else None)
    return _relative(expected, actual), _relative(expected[:, scores], actual[:, scores])


def _relative(expected: Tensor, actual: Tensor) -> float:
    distance, size = float((actual - expected).norm()), float(expected.norm())
    return distance / size if size else float("inf") if distance else 0.0


def _aligned(candidates: Tensor, rows: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Final rows (n, 6) of ONNX Runtime, each beside PyTorch's nearest.

    Rows are sorted by score and the list is cut at its end: rounding decides which of two nearly equal rows comes
    first, and which of the last ones is on the list at all. So a row finds its partner by what it says, not by where
    it stands, and rows that hardly differ from the lowest score look for none (unless all are such). With an embedded
    NMS the partner is sought among the boxes before NMS; whether NMS chose the same is for the detections to tell.
    """
    last = rows[:, 4] <= rows[:, 4].min() * (1 + margin)  # false for NaN, which must not get away
    judged = rows if last.all() else rows[~last]
    weight = torch.tensor([1, 1, 1, 1, 100, 1e4])  # of sides in pixels, score and class
    gap = torch.cdist(judged * weight, candidates * weight, compute_mode="donot_use_mm_for_euclid_dist")
    return candidates[gap.argmin(1)], judged


def _agreement(ours: View, theirs: View, conf: float, limits: Limits) -> float:
    """The least overlap of any detection with its partner of the same class on the other side; 0 without a partner.

    Detections at the threshold are left out; a tie that NMS decided the other way is no disagreement.
    """
    overlap = _overlap(ours.detections, theirs.detections)
    partners = (torch.zeros(len(ours.detections)), torch.zeros(len(theirs.detections)))
    while overlap.numel() and overlap.max() > 0:
        i, j = divmod(int(overlap.argmax()), overlap.shape[1])
        partners[0][i] = partners[1][j] = overlap[i, j]
        overlap[i], overlap[:, j] = 0, 0
    least = [1.0]
    for view, other, found in ((ours, theirs, partners[0]), (theirs, ours, partners[1])):
        if limits.ties:
            found = found.maximum(_best_tie(view.detections, other.candidates, limits.margin))
        judged = (view.detections[:, 4] - conf).abs() > limits.margin
        least += found[judged].tolist()
    return min(least)


def _overlap(ours: Tensor, theirs: Tensor) -> Tensor:
    """The IoU (n, m) of boxes of the same class, 0 for others."""
    iou: Tensor = box_iou(_upright(ours), _upright(theirs)).nan_to_num(0)
    return iou * (ours[:, 5:] == theirs[:, 5])


def _upright(rows: Tensor) -> Tensor:
    """The boxes with their corners in order: half-trained heads without DFL also predict negative sides."""
    first, second = rows[:, :2], rows[:, 2:4]
    return torch.cat([first.minimum(second), first.maximum(second)], 1)


def _best_tie(detections: Tensor, candidates: Tensor, margin: float) -> Tensor:
    """The largest overlap of each detection with any candidate that scores the same within the margin."""
    tie = (detections[:, 4:5] - candidates[:, 4]).abs() <= margin
    return (_overlap(detections, candidates) * tie).amax(1)


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


def precision_of(graph: onnx.ModelProto) -> str:
    """float16 if any weight of the graph is, else float32."""
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    return "float16" if half else "float32"
