"""export/detect.py: its detections equal those of Ultralytics, and it runs without other packages."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from helpers.data import NAMES
from helpers.device import SCRIPT, as_array, assert_same, detect
from helpers.models import SIZE, YOLO26N, YOLOV8N, calibrated_detector, save_trained_checkpoint
from onnxruntime.transformers import float16
from onnxruntime.transformers.onnx_model import OnnxModel
from PIL import Image
from ultralytics import YOLO

from yolokd.exporter import export

# An end-to-end model can't run on fewer anchors than it gives rows: narrow images need the larger size.
SIZES = {"static": SIZE, "dynamic": SIZE, "embedded": SIZE, "end2end": 2 * SIZE}
SIDES = ((80, 96), (200, 120), (97, 173), (160, 160), (61, 333))  # height, width
# Packages that a device does not have: importing one fails there.
ABSENT = (
    "torch",
    "torchvision",
    "ultralytics",
    "yolokd",
    "onnx",
    "PIL",
    "scipy",
    "yaml",
    "rich",
    "pydantic",
    "matplotlib",
)
ON_DEVICE = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write JPEGs of several sizes, with discs on a cloudy background; return their folder."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, (height, width) in enumerate(SIDES):
        clouds = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
        for x, y in rng.integers(0, (width, height), (6, 2)).tolist():
            cv2.circle(image, (x, y), max(height, width) // 12, rng.integers(0, 256, 3).tolist(), cv2.FILLED)
        cv2.imwrite(str(folder / f"{number}.jpg"), image)
    return folder


@pytest.fixture(scope="session")
def models(data: str, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Return (checkpoint, ONNX file) of each kind of export."""
    root = tmp_path_factory.mktemp("models")
    images = [cv2.imread(str(photo)) for photo in sorted(photos.iterdir())]
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "static": (YOLOV8N, {"imgsz": [128, SIZE]}),
        "dynamic": (YOLOV8N, {"dynamic": True}),
        "embedded": (YOLOV8N, {"nms": True, "batch": 2}),
        "end2end": (YOLO26N, {"nms": False, "dynamic": True, "simplify": False}),
    }
    made = {}
    for kind, (cfg, arguments) in kinds.items():
        checkpoint = save_trained_checkpoint(calibrated_detector(cfg, images, SIZES[kind]), data, root / f"{kind}.pt")
        made[kind] = checkpoint, Path(YOLO(checkpoint).export(format="onnx", **arguments))
    return made


def ultralytics(model: Path, source: Path, **arguments: Any) -> list[np.ndarray]:
    """Return Ultralytics' predictions, for each image (n, 6): box, score, class."""
    settings = {"conf": 0.25, "iou": 0.7, "verbose": False, "save": False, "device": "cpu"}
    results = YOLO(model, task="detect").predict(source, **settings | arguments)
    return [result.boxes.data.numpy() for result in results]


@pytest.mark.parametrize("kind", SIZES)
def test_detections_equal_those_of_ultralytics_on_the_same_file(
    kind: str, models: dict[str, tuple[Path, Path]], photos: Path
) -> None:
    path = models[kind][1]
    detector = detect.Detector(path, imgsz=SIZES[kind] if kind in ("dynamic", "end2end") else None)
    ours = [as_array(detector(cv2.imread(str(photo)))) for photo in sorted(photos.iterdir())]
    expected = ultralytics(path, photos, imgsz=SIZES[kind])
    assert sum(map(len, ours)) > 10
    for one, other in zip(ours, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("kind", SIZES)
def test_detections_equal_those_of_ultralytics_on_the_checkpoint(
    kind: str, models: dict[str, tuple[Path, Path]], photos: Path
) -> None:
    checkpoint, path = models[kind]
    detector = detect.Detector(path, imgsz=SIZES[kind] if kind in ("dynamic", "end2end") else None)
    # With a static file, Ultralytics pads images to the full size, too.
    settings = {"imgsz": list(detector.size), "rect": detector.dynamic} | ({"nms": False} if kind == "end2end" else {})
    expected = ultralytics(checkpoint, photos, **settings)
    for photo, theirs in zip(sorted(photos.iterdir()), expected, strict=True):
        assert_same(as_array(detector(cv2.imread(str(photo)))), theirs, pixels=0.05, score=1e-3)


def test_detections_have_names_and_lie_inside_the_image(models: dict[str, tuple[Path, Path]], photos: Path) -> None:
    detector = detect.Detector(models["dynamic"][1])
    image = cv2.imread(str(photos / "1.jpg"))
    detections = detector(image)
    assert detections
    for detection in detections:
        assert detection.name == NAMES[detection.class_id]
        assert 0.25 < detection.score <= 1
        x1, y1, x2, y2 = detection.box
        assert 0 <= x1 <= x2 <= image.shape[1]
        assert 0 <= y1 <= y2 <= image.shape[0]
    scores = [detection.score for detection in detections]
    assert scores == sorted(scores, reverse=True)


def test_thresholds_work_as_in_ultralytics(models: dict[str, tuple[Path, Path]], photos: Path) -> None:
    detector = detect.Detector(models["dynamic"][1])
    image = cv2.imread(str(photos / "3.jpg"))
    all_boxes, many, few = (detector(image, conf=0.05, iou=iou) for iou in (1.0, 0.5, 0.1))
    assert len(all_boxes) > len(many) > len(few)
    assert len(many) > len(detector(image)) > len(detector(image, conf=0.4)) > 0
    assert detector(image, max_det=2) == detector(image)[:2]
    for conf, iou in ((0.05, 0.7), (0.05, 0.3), (0.25, 0.5)):
        (expected,) = ultralytics(models["dynamic"][1], photos / "3.jpg", imgsz=SIZE, conf=conf, iou=iou)
        assert_same(as_array(detector(image, conf=conf, iou=iou)), expected)


def test_a_network_with_float16_input_runs(models: dict[str, tuple[Path, Path]], photos: Path, tmp_path: Path) -> None:
    """Exports on a GPU give such files: the network's inputs and outputs are float16."""
    original = onnx.load(models["static"][1])
    graph = float16.convert_float_to_float16(original, keep_io_types=False)
    OnnxModel(graph).topological_sort()
    onnx.save(graph, tmp_path / "half.onnx")
    detector = detect.Detector(tmp_path / "half.onnx")
    assert detector.dtype == np.float16
    (expected,) = ultralytics(tmp_path / "half.onnx", photos / "0.jpg", quantize=16)
    detections = as_array(detector(cv2.imread(str(photos / "0.jpg"))))
    assert len(detections) == len(expected) > 0
    assert np.abs(detections - expected).max() < 0.5  # the last bit of a coordinate


@pytest.mark.parametrize(("quantize", "pixels"), [(16, 0.5), (8, 0.01)])
def test_float16_and_int8_exports_run(
    quantize: int, pixels: float, models: dict[str, tuple[Path, Path]], photos: Path, data: str, tmp_path: Path
) -> None:
    checkpoint = shutil.copy(models["dynamic"][0], tmp_path / "m.pt")
    path = export(checkpoint, data=data, imgsz=[128, SIZE], quantize=quantize).path
    detector = detect.Detector(path)
    assert detector.names == NAMES
    found = [as_array(detector(cv2.imread(str(photo)))) for photo in sorted(photos.iterdir())]
    assert sum(map(len, found)) > 10
    for one, other in zip(found, ultralytics(path, photos, imgsz=[128, SIZE]), strict=True):
        assert_same(one, other, pixels)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_images_are_rotated_by_their_exif_orientation(
    orientation: int, models: dict[str, tuple[Path, Path]], photos: Path, tmp_path: Path
) -> None:
    rotated = tmp_path / "rotated.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(photos / "1.jpg").save(rotated, exif=exif, quality=95)
    image = detect.read_image(rotated)
    assert image.shape[:2] == ((200, 120) if orientation == 3 else (120, 200))
    (expected,) = ultralytics(models["dynamic"][1], rotated, imgsz=SIZE)
    assert len(expected)
    assert_same(as_array(detect.Detector(models["dynamic"][1])(image)), expected)


def test_a_video_gives_detections_of_each_frame(
    models: dict[str, tuple[Path, Path]], photos: Path, tmp_path: Path
) -> None:
    video, path = tmp_path / "clip.avi", models["static"][1]
    frame = cv2.imread(str(photos / "0.jpg"))
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"MJPG"), 5, (96, 80))
    for shift in range(4):
        writer.write(np.roll(frame, 6 * shift, axis=1))
    writer.release()
    code = detect.main([str(path), str(video), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "found.json")])
    assert code == 0
    records = json.loads((tmp_path / "found.json").read_text())
    assert [(record["image"], record["frame"]) for record in records] == [(str(video), number) for number in range(4)]
    for record, expected in zip(records, ultralytics(path, video), strict=True):
        ours = [[*d["box"], d["score"], d["class"]] for d in record["detections"]]
        assert_same(np.array(ours).reshape(-1, 6), expected)
    copy = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert copy.get(cv2.CAP_PROP_FPS) == 5
    frames = 0
    while copy.read()[0]:
        frames += 1
    assert frames == 4


def run_on_device(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a Python file in a process that can import NumPy, OpenCV and onnxruntime, but not the packages in ABSENT."""
    command = [sys.executable, "-c", ON_DEVICE, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_the_script_runs_without_torch_ultralytics_and_yolokd(
    models: dict[str, tuple[Path, Path]], photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "probe.py").write_text("import torch")
    assert "ModuleNotFoundError: torch" in run_on_device(tmp_path, "probe.py").stderr
    shutil.copy(SCRIPT, tmp_path)
    shutil.copy(models["dynamic"][1], tmp_path / "best.onnx")
    shutil.copytree(photos, tmp_path / "photos")
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "photos" / "notes.txt").write_text("no image at all")
    done = run_on_device(tmp_path, "detect.py", "best.onnx", "photos", "--out", "runs/out", "--json", "runs/found.json")
    assert done.returncode == 0, done.stderr
    assert "broken.jpg: unreadable image, skipped" in done.stderr
    summary = re.match(r"5 images, \d+ detections, ([\d.]+) ms each \(the model alone ([\d.]+)\); ", done.stdout)
    assert summary is not None, done.stdout
    assert float(summary[1]) > 0 < float(summary[2])
    records = json.loads((tmp_path / "runs" / "found.json").read_text())
    detector = detect.Detector(models["dynamic"][1])
    assert [record["image"] for record in records] == [str(Path("photos") / f"{n}.jpg") for n in range(5)]
    for record, expected in zip(records, ultralytics(models["dynamic"][1], photos, imgsz=SIZE), strict=True):
        ours = [[*d["box"], d["score"], d["class"]] for d in record["detections"]]
        assert_same(np.array(ours).reshape(-1, 6), expected)
        assert all(set(d) == {"class", "name", "score", "box"} for d in record["detections"])
        original, copy = (
            cv2.imread(str(folder / Path(record["image"]).name)).astype(int)
            for folder in (tmp_path / "photos", tmp_path / "runs" / "out")
        )
        drawn = detect.draw(original.astype(np.uint8), detector(original.astype(np.uint8)))
        if record["detections"]:  # apart from JPEG artefacts, the copy is the drawn image
            assert np.abs(copy - drawn).mean() < np.abs(copy - original).mean() / 2
    assert sum(len(record["detections"]) for record in records) > 10


def test_mistakes_give_one_line_of_error(
    models: dict[str, tuple[Path, Path]], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    static, dynamic = (str(models[kind][1]) for kind in ("static", "dynamic"))
    photo, empty, garbage = str(photos / "0.jpg"), tmp_path / "empty", tmp_path / "garbage.onnx"
    empty.mkdir()
    garbage.write_bytes(b"no model")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    out = ["--out", str(tmp_path / "out")]
    cases: list[tuple[list[str], str]] = [
        (["none.onnx", photo], "no such model file"),
        ([str(garbage), photo], "can't load it"),
        ([static, "nowhere"], "no such file or folder"),
        ([static, str(empty)], "no images here"),
        ([static, str(tmp_path / "broken.png")], "broken.png: unreadable image"),
        ([static, str(tmp_path / "broken.mp4")], "no frame of this video could be read"),
        ([static, photo, "--imgsz", "64"], "runs at 128x160 only"),
        ([dynamic, photo, "--imgsz", "1", "2", "3"], "height and width"),
        ([dynamic, photo, "--out", str(photos)], "holds the source"),
    ]
    for arguments, message in cases:
        assert detect.main([*arguments[:2], *out, *arguments[2:]]) == 2, arguments
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("detect.py: ")
        assert message in error
    assert sorted(path.name for path in photos.iterdir()) == [f"{number}.jpg" for number in range(5)]


def test_a_size_too_small_for_an_end_to_end_model_is_an_error(
    models: dict[str, tuple[Path, Path]], photos: Path
) -> None:
    detector = detect.Detector(models["end2end"][1], imgsz=32)
    with pytest.raises(detect.DetectError, match=r"does not run at 32x32: .*try another imgsz"):
        detector(cv2.imread(str(photos / "0.jpg")))


def test_networks_that_are_no_detectors_are_refused(models: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    graph = onnx.load(models["static"][1])
    (names,) = (entry for entry in graph.metadata_props if entry.key == "names")
    names.value = "{0: 'one class too few'}"
    onnx.save(graph, tmp_path / "other.onnx")
    with pytest.raises(detect.DetectError, match="not a YOLO detector"):
        detect.Detector(tmp_path / "other.onnx")


def test_arrays_that_are_no_bgr_images_are_refused(models: dict[str, tuple[Path, Path]]) -> None:
    detector = detect.Detector(models["static"][1])
    for array in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3), np.float32)):
        with pytest.raises(detect.DetectError, match="BGR"):
            detector(array)
    assert detector(np.zeros((1, 900, 3), np.uint8), conf=0.9) == []
