"""Small ONNX files, valid and odd ones, made without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

METADATA = {"names": "{0: 'disc', 1: 'box'}", "stride": "32", "imgsz": "[64, 64]", "end2end": "False", "args": "{}"}
IMAGE = (1, 3, 64, 64)


def boxes(*columns: Sequence[float]) -> np.ndarray:
    """Return raw output (1, 6, anchors): centre x, y, width, height and the scores of two classes for each anchor."""
    return np.array([columns], np.float32).transpose(0, 2, 1)


TWO_BOXES = boxes((20, 20, 10, 10, 0.9, 0.1), (50, 40, 20, 20, 0.2, 0.8))


def write_network(
    path: Path,
    result: np.ndarray = TWO_BOXES,
    inputs: Sequence[tuple[int, Sequence[Any] | None]] = ((TensorProto.FLOAT, IMAGE),),
    metadata: Mapping[str, str] = METADATA,
    hide_shape: bool = False,
) -> Path:
    """Write an ONNX file whose outputs are `result`, whatever the image; return its path.

    inputs: the type and shape of each. hide_shape: compute the output's shape from the input's, which must be dynamic;
    then only a run shows it.
    """
    kind = helper.np_dtype_to_tensor_dtype(result.dtype)
    sources = [helper.make_tensor_value_info(f"images{i}", *info) for i, info in enumerate(inputs)]
    constants = [numpy_helper.from_array(result, "result"), numpy_helper.from_array(np.zeros(3, np.int64), "zeros")]
    nodes = [helper.make_node("Identity", ["result"], ["output0"])]
    if hide_shape:  # a 0 in the new shape means: as it was
        nodes = [
            helper.make_node("Shape", ["images0"], ["sides"], end=3),
            helper.make_node("Mul", ["sides", "zeros"], ["same"]),
            helper.make_node("Reshape", ["result", "same"], ["output0"]),
        ]
    shape = ["batch", "fields", "anchors"] if hide_shape else result.shape
    output = helper.make_tensor_value_info("output0", kind, shape)
    graph = helper.make_graph(nodes, "g", sources, [output], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, dict(metadata))
    path.write_bytes(model.SerializeToString())
    return path
