"""Runs exported detectors of all formats but ONNX, with the runtimes that Ultralytics knows, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.nn.autobackend import AutoBackend

from yolokd.patches.no_autoinstall import no_autoinstall
from yolokd.runtime.console import warnings_only


class BackendDetector:
    """A detector that Ultralytics exported, with the same attributes as an OnnxDetector.

    Raises what its runtime raises if the file cannot be run here, or if a package is missing.
    """

    def __init__(self, path: Path) -> None:
        with no_autoinstall(), warnings_only():
            self.backend: Any = AutoBackend(str(path), device=torch.device("cpu"))
        meta: dict[str, Any] = self.backend.metadata
        arguments = meta.get("args", {})
        self.names: dict[int, str] = self.backend.names
        self.stride, self.batch = int(self.backend.stride), int(self.backend.batch)
        self.height, self.width = meta["imgsz"]
        self.channels = int(meta.get("channels", 3))
        self.dynamic = arguments.get("dynamic") is True
        self.embeds_nms = arguments.get("nms") is True
        self.end2end = bool(meta.get("end2end")) and not self.embeds_nms  # Ultralytics calls both end-to-end here

    @property
    def chooses_boxes(self) -> bool:
        """Return whether the model chooses its boxes itself."""
        return self.end2end or self.embeds_nms

    def __call__(self, images: Tensor) -> list[Tensor]:
        """Run on images (B, C, H, W), float32 in 0..1; return the same outputs as an OnnxDetector."""
        output = self.backend(images)
        return [each.float() for each in (output if isinstance(output, list | tuple) else [output])]
