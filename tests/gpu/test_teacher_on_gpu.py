"""The teacher on a GPU: beside the student, in half precision, compiled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.models import YOLOV8N, random_detector
from helpers.results import states_equal, weights
from helpers.runs import distil
from torch import Tensor

from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.precision import choose_precision, fast_precisions, measure_precision
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.models.teachers.teacher import InferenceSettings, Teacher

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture
def detector() -> Teacher:
    return detector_teacher(random_detector()).to(GPU)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 128, 160, generator=torch.Generator().manual_seed(0)).to(GPU)


def test_a_teacher_that_runs_ahead_gives_the_same_maps(detector: Teacher, images: Tensor) -> None:
    requested = RequestedOutputs(logits=True, boxes=True)
    serial = detector(images, requested)
    for _ in range(20):
        detector.start(images, requested)
        noise = [torch.rand_like(images) @ torch.rand_like(images).transpose(2, 3) for _ in range(8)]  # reuses memory
        overlapped = detector(images, requested)
        for ours, theirs in zip(vars(overlapped).values(), vars(serial).values(), strict=True):
            assert all(torch.equal(tensor, theirs[stride]) for stride, tensor in ours.items())
        del noise, overlapped


def test_the_output_of_a_step_that_failed_is_freed(detector: Teacher, images: Tensor) -> None:
    detector.start(images)
    detector(images)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    detector.start(images)
    assert torch.cuda.memory_allocated() > before
    detector.discard_pending()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("method", ["fitnet+pdf", "mgd"])
def test_a_training_with_overlap_and_graphs_equals_one_without(
    method: str, on_gpu: dict[str, Any], teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlapped = distil(teacher, YOLOV8N, on_gpu, method, teacher_precision="auto")
    assert overlapped.trainer.criterion.stage.teacher._graphs._recorded
    monkeypatch.setattr(Teacher, "start", lambda *_args: None)
    monkeypatch.setattr(Teacher, "_run", Teacher._forward)
    serial = distil(teacher, YOLOV8N, on_gpu, method, teacher_precision="auto")
    assert states_equal(weights(overlapped.trainer), weights(serial.trainer))


def test_every_fast_precision_gives_nearly_the_maps_of_float32(detector: Teacher, images: Tensor) -> None:
    plain = detector.with_settings(InferenceSettings(channels_last=True))
    precisions = fast_precisions(GPU)
    assert precisions
    for name in precisions:
        low, _ = choose_precision(detector, images, name, None)
        assert measure_precision(name, plain, low, images).faithful


def test_a_graph_gives_the_maps_and_predictions_of_the_teacher_itself(detector: Teacher, images: Tensor) -> None:
    settings = InferenceSettings(torch.float16, channels_last=True)
    plain = detector.with_settings(settings)
    graphed = detector.with_settings(replace(settings, graph_for=tuple(images.shape)))
    for seed in range(3):
        batch = torch.rand(images.shape, generator=torch.Generator(GPU).manual_seed(seed), device=GPU)
        for requested in (RequestedOutputs(), RequestedOutputs(logits=True, boxes=True)):
            graphed.start(batch, requested)
            for ours, theirs in zip(*(vars(t(batch, requested)).values() for t in (graphed, plain)), strict=True):
                assert all(torch.equal(tensor, theirs[stride]) for stride, tensor in ours.items())
    assert len(graphed._graphs._recorded) == 2
    graphed(images[:1])
    assert len(graphed._graphs._recorded) == 2


def test_a_teacher_that_cannot_be_recorded_runs_all_the_same(
    detector: Teacher, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = detector.with_settings(InferenceSettings())
    graphed = detector.with_settings(InferenceSettings(graph_for=tuple(images.shape)))
    forward = Teacher._forward

    def waiting(self: Teacher, *args: Any) -> Any:
        output = forward(self, *args)
        output.maps[8].sum().item()  # nothing that the host waits for can be recorded
        return output

    monkeypatch.setattr(Teacher, "_forward", waiting)
    for _ in range(2):
        assert torch.equal(graphed(images).maps[8], plain(images).maps[8])
    assert not graphed._graphs._recorded


def test_a_compiled_teacher_equals_the_plain_one_and_runs_on_its_own_stream(detector: Teacher, images: Tensor) -> None:
    plain, _ = choose_precision(detector, images, "auto", None)
    fast, notes = choose_precision(detector, images, "auto", None, len(images), compiled=True)
    assert notes[-1] == "compiled"
    for batch in (images, images[:1]):  # the second runs uncompiled
        fast.start(batch)
        torch.rand(2048, 2048, device=GPU) @ torch.rand(2048, 2048, device=GPU)
        for stride, maps in fast(batch).maps.items():
            torch.testing.assert_close(maps, plain(batch).maps[stride], rtol=0.02, atol=0.02)
