"""An exported ONNX file, run by ONNX Runtime on the CPU."""

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


def precision_of(graph: onnx.ModelProto) -> str:
    """float16 if any weight of the graph is, else float32."""
    half = any(tensor.data_type == TensorProto.FLOAT16 for tensor in graph.graph.initializer)
    return "float16" if half else "float32"
