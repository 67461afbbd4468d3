"""Quantization-aware training with a teacher: the student learns with fake quantizers, the rest stays in float."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from helpers.models import YOLOV8N
from helpers.results import rows, states_equal, weights
from helpers.runs import TINY, distil, train_and_stop
from torch import nn
from ultralytics.utils.torch_utils import is_qat

from yolokd import UserError, YoloDistiller
from yolokd.commands.deploy.run import choose_formats
from yolokd.commands.deploy.settings import DeploySettings
from yolokd.exporter import export
from yolokd.models.checkpoint import load_model
from yolokd.training import settings as training_settings


@pytest.fixture(scope="module")
def settings(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    project = str(tmp_path_factory.mktemp("int8"))
    return {**TINY, "data": data, "project": project, "epochs": 2, "check_teacher": False, "quantize": 8}


@pytest.fixture(scope="module")
def distilled(teacher: str, settings: dict[str, Any]) -> YoloDistiller:
    """Train a student with a teacher and fake quantizers for two epochs."""
    return distil(teacher, YOLOV8N, settings, "dfd", name="whole")


def quantizers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module).__name__ == "TensorQuantizer"]


def test_the_student_alone_is_quantized(distilled: YoloDistiller) -> None:
    trainer = distilled.trainer
    assert trainer is not None
    assert is_qat(trainer.model)
    assert quantizers(trainer.model.model)
    assert list(trainer.criterion.parameters())
    assert quantizers(trainer.criterion) == []
    assert not any(type(module).__name__.startswith("Quant") for module in trainer.criterion.modules())
    assert quantizers(trainer.criterion.stage.teacher._model) == []
    assert all(row["train/dfd_loss"] > 0 for row in rows(trainer))


def test_the_checkpoint_is_ultralytics_own(distilled: YoloDistiller) -> None:
    content = torch.load(distilled.trainer.best, weights_only=False)
    assert list(content["model"]._modules) == ["model"]
    assert quantizers(content["model"]) == []  # they travel beside the plain layers
    assert content["modelopt"].keys() == {"modelopt", "ranges"}
    model, _ = load_model(distilled.trainer.best, "model")
    assert quantizers(model)
    assert model.yolokd["method"] == "dfd"


def test_it_exports_to_an_int8_file_without_calibration(distilled: YoloDistiller, data: str, tmp_path: Path) -> None:
    report = export(shutil.copy(distilled.trainer.best, tmp_path), imgsz=64)
    assert report.passed
    assert report.precision == "int8"
    assert report.rows[0].raw < 1e-3  # both sides round alike
    operators = {node.op_type for node in onnx.load(report.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators
    with pytest.raises(UserError, match="cannot export a QAT model"):
        export(distilled.trainer.best, format="torchscript", imgsz=64)


def test_deploy_measures_it_in_int8_alone(distilled: YoloDistiller) -> None:
    module, _ = load_model(distilled.trainer.best, "model")
    settings = DeploySettings(model=str(distilled.trainer.best))
    assert [each.name for each in choose_formats(settings, module)] == ["onnx-int8", "openvino-int8"]
    with pytest.raises(UserError, match="formats=onnx: are not for a student that was trained with quantize=8"):
        choose_formats(settings.model_copy(update={"formats": ["onnx"]}), module)


@pytest.mark.slow
def test_an_interrupted_training_ends_as_one_that_was_not(
    distilled: YoloDistiller, teacher: str, settings: dict[str, Any]
) -> None:
    model = YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd")
    train_and_stop(model, settings | {"teacher_precision": "fp32", "name": "stopped"})
    resumed = YoloDistiller()
    resumed.train(resume=str(model.trainer.save_dir))
    assert resumed.trainer.start_epoch == 1
    assert quantizers(resumed.trainer.criterion) == []
    assert states_equal(weights(resumed.trainer), weights(distilled.trainer))
    saved = [torch.load(d.trainer.best, weights_only=False)["modelopt"]["ranges"] for d in (resumed, distilled)]
    assert states_equal(*saved)


def test_a_missing_package_is_named(teacher: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_settings, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"quantize=8: .* not installed \(pip install 'yolokd\[int8\]'\)"):
        distil(teacher, YOLOV8N, settings, "dfd", name="none")
