"""What a model costs: parameters, operations, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from ultralytics.utils.torch_utils import get_flops, get_num_params

from yolokd.models.detector import Detector
from yolokd.models.teachers.backbone import Backbone


@dataclass(frozen=True)
class ModelSize:
    """The size of a model: parameters, GFLOPs of a forward pass of one training image, bytes of its file."""

    name: str
    parameters: int
    gflops: float
    bytes: int

    def cells(self) -> tuple[str, str, str]:
        """Return the numbers as text, with units that a reader can compare."""
        return f"{self.parameters / 1e6:.2f} million", f"{self.gflops:.2f}", f"{self.bytes / 1e6:.1f} MB"


def model_size(model: Detector, file: Path, imgsz: int) -> ModelSize:
    """Return the size of a model, which the checkpoint `file` holds, for square images of `imgsz` pixels."""
    return ModelSize(file.name, get_num_params(model), get_flops(model, imgsz), file.stat().st_size)


@torch.no_grad()
def backbone_size(backbone: Backbone, name: str, imgsz: int) -> ModelSize:
    """Return the size of a timm backbone; its bytes are those of its float32 parameters."""
    with FlopCounterMode(display=False) as counter:
        backbone(torch.zeros(1, 3, imgsz, imgsz, device=backbone.mean.device))
    parameters = get_num_params(backbone)
    return ModelSize(name, parameters, counter.get_total_flops() / 1e9, 4 * parameters)
