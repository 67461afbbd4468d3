"""Runs an exported ONNX detector with ONNX Runtime on the CPU."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto
from torch import Tensor


class OnnxDetector:
    """A detector that Ultralytics exported to ONNX, run by ONNX Runtime on the CPU, with its metadata."""

    def __init__(self, path: Path) -> None:
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.input = self.session.get_inputs()[0]
        meta = self.session.get_modelmeta().custom_metadata_map
        self.names: dict[int, str] = ast.literal_eval(meta["names"])
        self.stride, self.batch = int(meta["stride"]), int(meta["batch"])
        self.height, self.width = ast.literal_eval(meta["imgsz"])
        self.channels = int(self.input.shape[1])
        self.dynamic = any(isinstance(side, str) for side in self.input.shape)
        self.end2end = meta["end2end"] == "True"
        self.embeds_nms = ast.literal_eval(meta["args"]).get("nms") is True

    @property
    def chooses_boxes(self) -> bool:
        """Return whether the model chooses its boxes itself."""
        return self.end2end or self.embeds_nms

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run on images (B, C, H, W), float32 in 0..1.

        Returns float32: (B, 4 + classes + own, anchors), or final rows (B, n, 6 + own) if the model chooses its boxes
        itself; of a segmentation model also the prototypes (B, coefficients, H, W).
        """
        # float16 files made on a GPU take and give float16.
        dtype = np.float16 if "float16" in self.input.type else np.float32
        outputs = self.session.run(None, {self.input.name: images.numpy().astype(dtype)})
        return [torch.from_numpy(output).float() for output in outputs]


def precision_of(graph: onnx.ModelProto) -> str:
    """Return "int8" if the graph quantizes anything, else "float16" if any weight is float16, else "float32"."""
    if any(node.op_type == "QuantizeLinear" for node in graph.graph.node):
        return "int8"
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    return "float16" if half else "float32"
