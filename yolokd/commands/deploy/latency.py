"""Latency and memory of one model, measured in a process of its own that imports no more than its runtime needs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from yolokd.commands.apart import call_apart
from yolokd.runtime.memory import peak_resident_mib
from yolokd.runtime.users_threads import set_threads

WARM_UP, MIN_RUNS, MAX_RUNS = 5, 20, 300  # forward passes
WARM_UP_SECONDS, SECONDS = 0.5, 8.0
TIMEOUT = 900.0  # seconds after which a runtime counts as one that hangs
Floats = npt.NDArray[Any]


@dataclass(frozen=True)
class LatencyRequest:
    """Says what to measure: a file on images of (height, width), alone in a batch, with a number of threads.

    Of a checkpoint, trust=True allows code to run.
    """

    file: Path
    size: tuple[int, int]
    channels: int
    threads: int
    trust: bool = False


@dataclass(frozen=True)
class Latency:
    """Medians and 95th percentiles of a warm model's milliseconds, and the peak of its process's memory.

    runtime: its name and version.
    """

    p50_ms: float
    p95_ms: float
    runs: int
    peak_mib: float
    runtime: str


def measure_in_process(request: LatencyRequest) -> Latency:
    """Measure in a new process. Raises ProcessFailure if the file does not run there, or if the process dies."""
    before = dict(os.environ)
    set_threads(request.threads)
    try:
        return call_apart(_measure_silently, request, timeout=TIMEOUT)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _measure_silently(request: LatencyRequest) -> Latency:
    """Measure in this process, and drop what runtimes print."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    return measure(request)


def measure(request: LatencyRequest) -> Latency:
    """Run a model on noise until enough runs are measured."""
    run, runtime = _open(request)
    image = np.random.default_rng(0).random((1, request.channels, *request.size), np.float32)
    _times(run, image, WARM_UP, WARM_UP, WARM_UP_SECONDS)
    times = _times(run, image, MIN_RUNS, MAX_RUNS, SECONDS)
    p50, p95 = np.percentile(times, [50, 95]) * 1000
    return Latency(float(p50), float(p95), len(times), peak_resident_mib(), runtime)


def _times(run: Callable[[Floats], object], image: Floats, least: int, most: int, seconds: float) -> list[float]:
    """Return the seconds of each run: at least `least` runs, then more until `most`, or until the time is over."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < least or (len(times) < most and time.perf_counter() < end):
        started = time.perf_counter()
        run(image)
        times.append(time.perf_counter() - started)
    return times


def _open(request: LatencyRequest) -> tuple[Callable[[Floats], object], str]:
    """Return a function that runs the model on an image (1, C, H, W), float32 in 0..1, and the runtime's name."""
    name = request.file.name
    if name.endswith(".onnx"):
        return _open_onnx(request)
    if name.endswith("_openvino_model"):
        return _open_openvino(request)
    if name.endswith(".torchscript"):
        return _open_torchscript(request)
    return _open_with_ultralytics(request)


def _open_onnx(request: LatencyRequest) -> tuple[Callable[[Floats], object], str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = request.threads, 1
    session = onnxruntime.InferenceSession(str(request.file), options, providers=["CPUExecutionProvider"])
    source = session.get_inputs()[0]
    dtype = np.float16 if "float16" in source.type else np.float32
    return lambda image: session.run(None, {source.name: image.astype(dtype)}), f"onnxruntime {onnxruntime.__version__}"


def _open_openvino(request: LatencyRequest) -> tuple[Callable[[Floats], object], str]:
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": request.threads}
    compiled = openvino.Core().compile_model(str(next(request.file.glob("*.xml"))), "CPU", config)
    return lambda image: compiled(image), f"openvino {openvino.__version__.partition('-')[0]}"


def _open_torchscript(request: LatencyRequest) -> tuple[Callable[[Floats], object], str]:
    import torch

    torch.set_num_threads(request.threads)
    model = torch.jit.load(str(request.file), map_location="cpu").eval()  # type: ignore[no-untyped-call]
    return _without_gradients(model), f"torch {torch.__version__}"


def _open_with_ultralytics(request: LatencyRequest) -> tuple[Callable[[Floats], object], str]:
    """Open a checkpoint, or a file of any other format, with Ultralytics' backend for it."""
    import torch
    from ultralytics import __version__
    from ultralytics.nn.autobackend import AutoBackend

    from yolokd.models.checkpoint import load_model
    from yolokd.patches.no_autoinstall import no_autoinstall

    with no_autoinstall():
        is_checkpoint = request.file.suffix == ".pt"
        source = load_model(request.file, "model", request.trust)[0] if is_checkpoint else str(request.file)
        model = AutoBackend(source, device=torch.device("cpu"), verbose=False)
    torch.set_num_threads(request.threads)
    return _without_gradients(model), f"torch {torch.__version__}" if is_checkpoint else f"ultralytics {__version__}"


def _without_gradients(model: Callable[[Any], object]) -> Callable[[Floats], object]:
    """Return a function that runs a model of torch on a NumPy array, without gradients."""
    import torch

    def run(image: Floats) -> object:
        with torch.inference_mode():
            return model(torch.from_numpy(image))

    return run
