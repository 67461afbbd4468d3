"""export/web: the page in a real browser finds what export/detect.py finds."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from helpers.browser import Visit, opened
from helpers.device import SCRIPT, detect
from helpers.models import YOLO26N, YOLOV8N, calibrated_detector, save_trained_checkpoint
from helpers.served import served
from test_detect import as_array, assert_same
from ultralytics import YOLO

PAGE = SCRIPT.parent / "web"
SIZES = [(90, 150), (211, 160), (128, 128)]  # of pictures, height and width: larger, higher, and as the network's
EXPORTS: dict[str, tuple[str, dict[str, Any]]] = {
    "static": (YOLOV8N, {"imgsz": [96, 128]}),
    "dynamic": (YOLOV8N, {"dynamic": True, "imgsz": 128}),
    "embedded": (YOLOV8N, {"nms": True, "imgsz": 128, "batch": 2}),
    "end2end": (YOLO26N, {"nms": False, "imgsz": 128, "simplify": False}),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write a picture of each of SIZES, with discs on a cloudy background."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{height}x{width}.png" for height, width in SIZES]
    for path, (height, width) in zip(paths, SIZES, strict=True):
        clouds = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = cv2.resize(clouds, (width, height), interpolation=cv2.INTER_CUBIC)
        for x, y in rng.integers(0, (width, height), (6, 2)).tolist():
            cv2.circle(picture, (x, y), max(height, width) // 12, rng.integers(0, 256, 3).tolist(), cv2.FILLED)
        cv2.imwrite(str(path), picture)
    return paths


@pytest.fixture(scope="module")
def folder(pictures: list[Path], data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Set the page up as export/README.md says, with a model of each of EXPORTS; return its folder."""
    folder = tmp_path_factory.mktemp("web") / "web"
    shutil.copytree(PAGE, folder, ignore=shutil.ignore_patterns("node_modules"))
    subprocess.run(["npm", "install", "--no-audit", "--no-fund", "--silent"], cwd=folder, check=True)
    images = [cv2.imread(str(picture)) for picture in pictures]
    for name, (cfg, arguments) in EXPORTS.items():
        checkpoint = save_trained_checkpoint(calibrated_detector(cfg, images, 128), data, folder / f"{name}.pt")
        YOLO(checkpoint).export(format="onnx", **arguments)
    shutil.copy(folder / "static.onnx", folder / "model.onnx")
    return folder


@contextmanager
def page_of(folder: Path, width: int = 1280) -> Iterator[Visit]:
    """Open the page; yield it when the model beside it is loaded."""
    with served(folder) as address, opened(address, width) as visit:
        visit.page.wait_for_selector("#picture:enabled", state="attached")
        yield visit
        assert all(request.startswith(address) or request.startswith("blob:") for request in visit.requests)
        assert visit.complaints == []


def found_on(page: Any, picture: Path) -> list[dict[str, Any]]:
    """Choose a picture on the page; return what the page finds, as it lists it."""
    page.evaluate("document.getElementById('count').textContent = ''")
    page.set_input_files("#picture", picture)
    page.wait_for_function("document.getElementById('count').textContent != ''")
    return [json.loads(item) for item in page.eval_on_selector_all("li", "all => all.map(i => i.dataset.detection)")]


@pytest.mark.parametrize("name", EXPORTS)
def test_the_page_finds_what_detect_finds(name: str, folder: Path, pictures: list[Path]) -> None:
    detector = detect.Detector(folder / f"{name}.onnx")
    with page_of(folder) as visit:
        visit.page.set_input_files("#model", folder / f"{name}.onnx")
        visit.page.wait_for_function(f"document.getElementById('status').textContent.startsWith('{name}.onnx finds')")
        count = 0
        for picture in pictures:
            found = found_on(visit.page, picture)
            expected = as_array(detector(cv2.imread(str(picture))))
            count += len(expected)
            assert all(each["name"] == detector.names[each["class"]] for each in found)
            rows = np.array([[*each["box"], each["score"], each["class"]] for each in found])
            assert_same(rows.reshape(-1, 6), expected, pixels=0.05, score=1e-3)
        assert count


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_shows_the_objects_of_a_picture_and_fits_the_window(
    width: int, folder: Path, pictures: list[Path], tmp_path: Path
) -> None:
    with page_of(folder, width) as visit:
        found = found_on(visit.page, pictures[0])
        assert visit.page.inner_text("#count").startswith(f"{len(found)} object")
        assert visit.overflow() == 0
        before = visit.page.screenshot(path=tmp_path / "page.png")
        visit.page.fill("#conf", "0.95")
        fewer = sum(each["score"] > 0.95 for each in found)
        assert fewer < len(found)
        visit.page.wait_for_function(f"document.querySelectorAll('li').length == {fewer}")
        assert visit.page.screenshot() != before


def test_the_camera_runs_until_it_is_stopped(folder: Path) -> None:
    with page_of(folder) as visit:
        visit.page.click("#camera")
        visit.page.wait_for_function("document.getElementById('count').textContent != ''")
        assert visit.page.inner_text("#camera") == "Stop the camera"
        visit.page.click("#camera")
        assert visit.page.inner_text("#camera") == "Start the camera"


@pytest.mark.parametrize(
    ("content", "says"), [(b"no model", "cannot be used"), (b"", "cannot be used"), (None, "Put an exported file")]
)
def test_a_model_that_cannot_be_used_is_named(content: bytes | None, says: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "web", ignore=shutil.ignore_patterns("*.onnx", "*.pt", "node_modules"))
    (tmp_path / "web" / "node_modules").symlink_to(folder / "node_modules")
    if content is not None:
        (tmp_path / "web" / "model.onnx").write_bytes(content)
    with served(tmp_path / "web") as address, opened(address, 800) as visit:
        visit.page.wait_for_function(f"document.getElementById('status').textContent.includes('{says}')")
        assert visit.page.locator("#picture").is_disabled()


def test_python_literals_are_read_and_nothing_else_is(folder: Path) -> None:
    literals = {
        "{0: 'disc', 1: \"it's\"}": {"0": "disc", "1": "it's"},
        "[640, 480]": [640, 480],
        "(1.5, -2e3)": [1.5, -2000],
        "{'nms': True, 'a': None, 'b': [], 'c': {}}": {"nms": True, "a": None, "b": [], "c": {}},
        r"'\x41\u00e9\U0001F600\\\n'": "Aé😀\\\n",
    }
    with page_of(folder) as visit:
        read = "async text => (await import('./metadata.js')).pythonLiteral(text)"
        for text, value in literals.items():
            assert visit.page.evaluate(read, text) == value
        for text in ("alert(1)", "{0: }", "[1, 2", "'open", "1 2", "", "{1}"):
            failed = visit.page.evaluate(f"text => ({read})(text).then(() => false, () => true)", text)
            assert failed, text
