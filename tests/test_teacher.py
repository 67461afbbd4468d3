"""The teacher as an engine: precisions, image sizes, branches of its head."""

from __future__ import annotations

import pytest
import torch
from conftest import random_detector
from torch import Tensor, nn

from yolokd import precision
from yolokd.precision import FASTER, LIMIT, attempt, fit
from yolokd.teacher import Engine, Teacher


@pytest.fixture
def teacher() -> Teacher:
    return Teacher(random_detector())


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "engine", [Engine(channels_last=True), Engine(torch.bfloat16), Engine(torch.bfloat16, channels_last=True)]
)
def test_every_engine_sees_what_float32_sees(teacher: Teacher, images: Tensor, engine: Engine) -> None:
    plain, fast = teacher(images, logits=True), teacher.on(engine)(images, logits=True)
    limit = LIMIT if engine.dtype == torch.bfloat16 else 1e-5
    for stride, expected in plain.maps.items():
        assert fast.maps[stride].dtype == engine.dtype
        assert fast.maps[stride].shape == expected.shape
        assert relative(fast.maps[stride], expected) < limit
        assert relative(fast.logits[stride], plain.logits[stride]) < 3 * limit
    assert all(v.dtype == torch.float32 for v in teacher.state_dict().values() if v.is_floating_point())


def test_a_students_autocast_leaves_the_teacher_alone(teacher: Teacher, images: Tensor) -> None:
    plain = teacher(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(m, plain.maps[s]) for s, m in teacher(images).maps.items())


def test_images_of_another_size_give_maps_of_that_size(teacher: Teacher, images: Tensor) -> None:
    larger = teacher.on(Engine(imgsz=192))(images, logits=True)
    assert {s: tuple(m.shape[-2:]) for s, m in larger.maps.items()} == {8: (16, 24), 16: (8, 12), 32: (4, 6)}
    assert larger.logits[8].shape[-2:] == (16, 24)
    flat = torch.full_like(images, 0.5)
    centre = teacher(flat).maps[8][..., 4, 6], teacher.on(Engine(imgsz=192))(flat).maps[8][..., 8, 12]
    assert relative(centre[0], centre[1]) < 0.5  # the same grey, seen with other borders


def test_auto_takes_only_what_is_faithful_and_fast(
    teacher: Teacher, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "FASTER", 0.0)
    fast, notes = fit(teacher, images, "auto", False, None)
    assert fast.engine.dtype == torch.bfloat16
    assert "taken" in notes[0]
    monkeypatch.setattr(precision, "LIMIT", 1e-6)
    fallen, notes = fit(teacher, images, "auto", False, None)
    assert fallen.engine.dtype == torch.float32
    assert "not taken" in notes[0]
    asked, notes = fit(teacher, images, "bf16", False, None)
    assert asked.engine.dtype == torch.bfloat16
    assert "more than" in notes[0]
    monkeypatch.setattr(precision, "LIMIT", LIMIT)
    monkeypatch.setattr(precision, "FASTER", float("inf"))
    assert fit(teacher, images, "auto", False, None)[0].engine.dtype == torch.float32
    assert FASTER > 1


def test_maps_that_overflow_are_not_faithful(images: Tensor) -> None:
    model = random_detector()
    with torch.no_grad():
        next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).weight.fill_(1e30)
    loud = Teacher(model)
    assert not attempt("fp16", loud, loud.on(Engine(torch.float16)), images[:, :, :32, :32]).faithful


def test_both_branches_of_an_end_to_end_teacher(images: Tensor) -> None:
    model = random_detector("yolo26n.yaml")
    with torch.no_grad():
        model.model[-1].one2one_cv3[0][-1].bias.add_(1)
    teacher = Teacher(model)
    output = teacher(images, logits=True, one2one=True)
    assert not output.one2one[8].equal(output.logits[8])
    features = [m.float() for m in output.maps.values()]
    head = model.model[-1]
    with torch.no_grad():
        for stride, feature, many, one in zip(output.maps, features, head.cv3, head.one2one_cv3, strict=True):
            assert torch.allclose(output.logits[stride], many(feature), rtol=1e-3, atol=1e-3)
            assert torch.allclose(output.one2one[stride], one(feature), rtol=1e-3, atol=1e-3)
    assert not Teacher(random_detector())(images, one2one=True).one2one


def test_a_compiled_teacher_equals_the_plain_one_or_says_why_not(teacher: Teacher, images: Tensor) -> None:
    fast, notes = fit(teacher, images, "fp32", True, None)
    assert ("compiled" in notes[-1]) or ("runs uncompiled" in notes[-1])
    assert fast.engine.compiled == (notes[-1] == "compiled")
    for stride, expected in teacher(images).maps.items():
        assert relative(fast(images).maps[stride], expected) < 1e-4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="overlap needs a CUDA device")
def test_the_overlapped_teacher_equals_the_serial_one(teacher: Teacher, images: Tensor) -> None:
    images, on_gpu = images.cuda(), teacher.to(torch.device("cuda"))
    serial = on_gpu(images, logits=True)
    for _ in range(20):
        on_gpu.start(images, logits=True)
        noise = [torch.rand_like(images) @ torch.rand_like(images).transpose(2, 3) for _ in range(8)]  # reuses memory
        overlapped = on_gpu(images, logits=True)
        assert all(torch.equal(m, serial.maps[s]) for s, m in overlapped.maps.items())
        del noise, overlapped
