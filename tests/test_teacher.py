"""How the teacher runs: precisions, image sizes, branches of its head."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.data import two_images
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, attach_criterion, random_detector
from torch import Tensor, nn
from ultralytics.cfg import get_cfg

from yolokd.config.parse import parse
from yolokd.data.dataset import sample_batch
from yolokd.distillation import stage as stage_module
from yolokd.distillation.stage import Stage
from yolokd.methods import registered
from yolokd.models.detector import read_pyramid
from yolokd.models.teachers import precision
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.precision import MAX_ERROR, choose_precision, fast_precisions, measure_precision
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.models.teachers.teacher import InferenceSettings, Teacher
from yolokd.pyramid.pairing import Pairing, pair_classes, pair_levels


@pytest.fixture
def teacher() -> Teacher:
    return detector_teacher(random_detector())


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def relative_error(maps: Tensor, expected: Tensor) -> float:
    return float((maps.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "settings",
    [
        InferenceSettings(channels_last=True),
        InferenceSettings(torch.bfloat16),
        InferenceSettings(torch.bfloat16, channels_last=True),
    ],
)
def test_every_inference_setting_gives_nearly_the_maps_of_float32(
    teacher: Teacher, images: Tensor, settings: InferenceSettings
) -> None:
    requested = RequestedOutputs(logits=True)
    plain, fast = teacher(images, requested), teacher.with_settings(settings)(images, requested)
    limit = MAX_ERROR if settings.dtype == torch.bfloat16 else 1e-5
    for stride, expected in plain.maps.items():
        assert fast.maps[stride].dtype == settings.dtype
        assert fast.maps[stride].shape == expected.shape
        assert relative_error(fast.maps[stride], expected) < limit
        assert relative_error(fast.logits[stride], plain.logits[stride]) < 3 * limit
    assert all(v.dtype == torch.float32 for v in teacher.state_dict().values() if v.is_floating_point())


@pytest.mark.parametrize("name", [YOLOV8N, YOLO26N])
def test_boxes_equal_those_that_ultralytics_decodes(name: str, images: Tensor) -> None:
    model = random_detector(name)
    distances_by_stride = detector_teacher(model)(images, RequestedOutputs(boxes=True)).boxes
    model.end2end = False  # it then decodes the branch that is distilled
    with torch.no_grad():
        theirs = model.eval()(images)[0][:, :4]  # centers and sizes in pixels
    ours = []
    for stride, distances in distances_by_stride.items():
        b, _, h, w = distances.shape
        y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
        left, top, right, bottom = distances.unbind(1)
        boxes = torch.stack([x + (right - left) / 2, y + (bottom - top) / 2, left + right, top + bottom], 1)
        ours.append(boxes.view(b, 4, -1) * stride)
    assert torch.allclose(torch.cat(ours, 2), theirs, atol=1e-3)


def test_autocast_for_the_student_does_not_change_the_teacher(teacher: Teacher, images: Tensor) -> None:
    plain = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(m, plain.maps[s]) for s, m in teacher(images).maps.items())


@pytest.mark.parametrize(("side", "seen"), [(192, (128, 192)), (48, (32, 64)), (100, (64, 96))])
def test_a_teachers_image_size_resizes_the_images(
    teacher: Teacher, images: Tensor, side: int, seen: tuple[int, int]
) -> None:
    """imgsz is the longest side in pixels; each side is stretched to a multiple of the coarsest stride."""
    resized = F.interpolate(images, size=seen, mode="bilinear", antialias=side < 96)
    expected, maps = teacher(resized).maps, teacher.with_settings(InferenceSettings(imgsz=side))(images).maps
    assert all(torch.allclose(maps[s], expected[s], atol=1e-5) for s in expected)


def test_auto_chooses_a_precision_only_if_the_device_is_fast_in_it_and_the_maps_stay_close(
    teacher: Teacher, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: True)
    fast, notes = choose_precision(teacher, images, "auto", None)
    assert fast.settings.dtype == torch.bfloat16
    assert "taken" in notes[0]
    monkeypatch.setattr(precision, "MAX_ERROR", 1e-6)
    fallen, notes = choose_precision(teacher, images, "auto", None)
    assert fallen.settings.dtype == torch.float32
    assert "not taken" in notes[0]
    forced, notes = choose_precision(teacher, images, "bf16", None)
    assert forced.settings.dtype == torch.bfloat16
    assert "more than" in notes[0]
    monkeypatch.setattr(precision, "MAX_ERROR", MAX_ERROR)
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: False)
    slow, notes = choose_precision(teacher, images, "auto", None)
    assert slow.settings.dtype == torch.float32
    assert notes == ["this CPU has no fast instructions below fp32"]


@pytest.mark.parametrize(
    ("capability", "expected"), [((6, 1), ()), ((7, 0), ("fp16",)), ((7, 5), ("fp16",)), ((9, 0), ("fp16", "bf16"))]
)
def test_the_precisions_of_a_gpu_follow_from_its_compute_capability(
    capability: tuple[int, int], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert fast_precisions(torch.device("cuda")) == expected


def test_a_precision_whose_maps_overflow_is_not_accurate(images: Tensor) -> None:
    model = random_detector()
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight.fill_(1e30)
    loud = detector_teacher(model)
    assert not measure_precision(
        "fp16", loud, loud.with_settings(InferenceSettings(torch.float16)), images[:, :, :32, :32]
    ).faithful


def test_mean_logits_are_the_mean_of_an_end_to_end_teachers_branches(images: Tensor) -> None:
    model = random_detector(YOLO26N)
    head = model.model[-1]
    with torch.no_grad():
        head.one2one_cv3[0][-1].bias.add_(1)
        output = detector_teacher(model)(images, RequestedOutputs(logits=True, mean_logits=True))
        for stride, many, one in zip(output.maps, head.cv3, head.one2one_cv3, strict=True):
            feature = output.maps[stride]
            assert torch.allclose(output.logits[stride], many(feature), rtol=1e-3, atol=1e-3)
            mean = (many(feature) + one(feature)) / 2
            assert torch.allclose(output.mean_logits[stride], mean, rtol=1e-3, atol=1e-3)
    assert not output.mean_logits[8].equal(output.logits[8])
    single = detector_teacher(random_detector())(images, RequestedOutputs(logits=True, mean_logits=True))
    assert single.mean_logits[8].equal(single.logits[8])


def test_a_compiled_teacher_equals_the_plain_one(teacher: Teacher, images: Tensor) -> None:
    if shutil.which("c++") is None:
        pytest.skip("torch.compile needs a C++ compiler on CPUs")
    fast, notes = choose_precision(teacher, images, "fp32", None, len(images), compiled=True)
    assert notes[-1] == "compiled"
    assert fast.settings.compiled_for == images.shape
    for batch in (images, images[:1]):
        for stride, expected in teacher(batch).maps.items():
            assert relative_error(fast(batch).maps[stride], expected) < 1e-4


@pytest.mark.parametrize(("batch", "compiled"), [(2, True), (1, False)])
def test_only_batches_of_the_trainings_shape_run_compiled(
    batch: int, compiled: bool, teacher: Teacher, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[torch.Size] = []

    def noting(model: nn.Module) -> Any:
        return lambda images: runs.append(images.shape) or model(images)

    monkeypatch.setattr("yolokd.models.teachers.teacher._compiled", noting)
    fast, _ = choose_precision(teacher, images[:1], "fp32", None, len(images), compiled=True)
    runs.clear()
    fast(images[:batch])
    assert runs == ([images.shape] if compiled else [])


def test_a_teacher_that_fails_to_compile_runs_uncompiled(
    teacher: Teacher, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_model: nn.Module) -> Any:
        def run(_images: Tensor) -> Any:
            raise RuntimeError("no compiler here")

        return run

    monkeypatch.setattr("yolokd.models.teachers.teacher._compiled", broken)
    plain, notes = choose_precision(teacher, images, "fp32", None, len(images), compiled=True)
    assert notes[-1] == "teacher_compile: RuntimeError: no compiler here; runs uncompiled"
    assert relative_error(plain(images).maps[8], teacher(images).maps[8]) < 1e-5


def test_sample_batches_are_letterboxed_rgb_images(tmp_path: Path) -> None:
    red = np.zeros((40, 80, 3), np.uint8)
    red[..., 2] = 255  # BGR
    cv2.imwrite(str(tmp_path / "red.png"), red)
    batch = sample_batch({"val": str(tmp_path), "channels": 3}, 64)
    assert batch.shape == (1, 3, 64, 64)
    assert batch[0, :, 32, 32].tolist() == [1, 0, 0]
    assert torch.allclose(batch[0, :, 2, 32], torch.full((3,), 114 / 255))
    assert sample_batch({"val": str(tmp_path), "channels": 5}, 64).shape[1] == 5


# A value that bfloat16 rounds across 0 changes a ReLU's gradient, or that of an absolute value, by all of it.
LIMITS = dict.fromkeys(("dfd", "dfmsd", "fgd", "mgd", "sl2"), 0.06)
WITHOUT_ADAPTERS = {"bckd", "ld"}
OURS = {name for name, method in registered().items() if method.__module__.startswith("yolokd.")}


@pytest.mark.parametrize("method", sorted(OURS - WITHOUT_ADAPTERS))
def test_adapters_and_generators_run_in_bfloat16_beside_a_teacher_in_it_with_nearly_the_same_gradients(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = random_detector()
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(YOLOV8S, seed=1), student, method=method)
    stage = criterion.stage
    stage.teacher = stage.teacher.with_settings(InferenceSettings(torch.bfloat16, channels_last=True))
    preds, batch = student(two_images()["img"]), two_images()
    dtypes: set[torch.dtype] = set()
    for module in stage.methods.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _module, _inputs, output: dtypes.add(output.dtype))

    def gradients() -> Tensor:
        criterion.begin_epoch(5, epochs=10, steps=1)
        maps = [m.detach().requires_grad_() for m in preds["feats"]]
        loss = criterion(preds | {"feats": maps}, batch)[0][3:].sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, maps)])

    low = gradients()
    assert dtypes == {torch.bfloat16}
    monkeypatch.setattr(stage_module, "_methods_autocast", lambda *_: nullcontext())
    assert 0 < relative_error(low, gradients()) < LIMITS.get(method, 0.01)


@pytest.mark.parametrize("channels_last", [True, False])
def test_adapters_have_the_teachers_memory_format(channels_last: bool) -> None:
    detector, student = random_detector(YOLOV8S), random_detector()
    pairing = Pairing(
        tuple(pair_levels(read_pyramid(detector), read_pyramid(student))),
        (8, 16, 32),
        pair_classes(detector.names, student.names),
    )
    teacher = detector_teacher(detector).with_settings(InferenceSettings(channels_last=channels_last))
    stage = Stage(teacher, pairing, parse({"teacher": "t", "method": "mgd"}), seed=0, number=0)
    weights = [weight for weight in stage.parameters() if weight.ndim == 4 and weight[0, 0].numel() > 1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert weights
    assert all(weight.is_contiguous(memory_format=layout) for weight in weights)
