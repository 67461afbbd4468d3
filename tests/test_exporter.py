"""Export and its parity check, on small random detectors and JPEG images."""

from __future__ import annotations

import itertools
import json
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml
from helpers.data import NAMES
from helpers.kills import fork_until_killed, run_until_killed
from helpers.models import SIZE, YOLOV8N, calibrated_detector, save_checkpoint, save_trained_checkpoint
from helpers.networks import METADATA, write_network
from helpers.runs import captured_log
from onnx import numpy_helper
from ultralytics.nn.tasks import ClassificationModel, DetectionModel

from yolokd.data.dataset import validation_images
from yolokd.distiller import load_yolo
from yolokd.errors import UserError
from yolokd.exporter import export_model, parity
from yolokd.exporter.agreement import Limits, Thresholds
from yolokd.exporter.export_model import (
    INT8_ONLY,
    _calibration_options,
    _check_options,
    _precision,
    export,
    export_into,
)
from yolokd.exporter.parity import ExportReport, verify
from yolokd.exporter.staging import PREFIX, publish, staging_folder
from yolokd.models.checkpoint import load_model
from yolokd.runtime.files import sha256

TEACHERS = [{"file": "weak.pt", "sha256": "2c"}, {"file": "big.pt", "sha256": "0a1b"}]
PROVENANCE = {"teacher": TEACHERS, "method": "dfd+pdf", "gains": {"dfd": 1.0, "pdf": 0.5}}


@pytest.fixture(scope="session")
def checkpoints(data: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, images = tmp_path_factory.mktemp("checkpoints"), validation_images(data)
    distilled = calibrated_detector(YOLOV8N, images, SIZE)
    distilled.yolokd = PROVENANCE
    return {
        "v8": save_trained_checkpoint(distilled, data, root / "v8.pt"),
        "v26": save_trained_checkpoint(calibrated_detector("yolo26n.yaml", images, SIZE), data, root / "v26.pt"),
    }


@pytest.fixture(scope="session")
def plain(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    """Export yolov8n as a static float32 file."""
    return export(shutil.copy(checkpoints["v8"], tmp_path_factory.mktemp("plain") / "best.pt"))


@pytest.fixture
def copied(plain: ExportReport, tmp_path: Path) -> Path:
    """Copy that ONNX file, so that a test can change it."""
    return Path(shutil.copy(plain.path, tmp_path / "best.onnx"))


def check(path: Path, checkpoint: Path, data: str) -> ExportReport:
    return verify(path, load_model(checkpoint, "model")[0], validation_images(data), Thresholds())


def metadata(path: Path) -> dict[str, str]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(session.get_modelmeta().custom_metadata_map)


def sizes(report: ExportReport) -> list[tuple[int, int, int]]:
    return [(row.batch, row.height, row.width) for row in report.rows]


def test_a_static_export_passes_at_its_own_size(plain: ExportReport) -> None:
    assert plain.passed
    assert sizes(plain) == [(1, SIZE, SIZE)]
    (row,) = plain.rows
    assert row.raw < 1e-5
    assert row.images == 6
    assert row.torch_detections == row.file_detections > 20


def test_the_parity_table_is_written_beside_the_file(plain: ExportReport) -> None:
    assert plain.parity == plain.path.with_name("best.parity.json")
    record = json.loads(plain.parity.read_text())
    assert record["passed"] is True
    assert record["file"] == "best.onnx"
    assert record["rows"] == [row.model_dump() for row in plain.rows]
    assert record["versions"]["onnxruntime"] == onnxruntime.__version__
    assert set(record["versions"]) == {"torch", "onnx", "onnxruntime", "ultralytics"}
    assert sorted(path.name for path in plain.path.parent.iterdir()) == ["best.onnx", "best.parity.json", "best.pt"]


def test_the_file_holds_ultralytics_metadata_and_provenance(plain: ExportReport) -> None:
    meta = metadata(plain.path)
    assert meta["names"] == str(NAMES)
    assert meta["stride"] == "32"
    assert meta["teacher"] == "weak.pt, big.pt"
    assert meta["method"] == "dfd+pdf"
    assert json.loads(meta["yolokd"]) == PROVENANCE


def test_a_dynamic_export_is_checked_at_two_batch_sizes_and_two_image_sizes(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    report = export(shutil.copy(checkpoints["v8"], tmp_path), dynamic=True)
    assert report.passed
    assert sizes(report) == [(1, 160, 160), (3, 160, 160), (1, 96, 160), (3, 96, 160)]
    assert all(row.torch_detections for row in report.rows)


def test_the_batches_of_a_static_export_are_filled_up(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    report = export(shutil.copy(checkpoints["v8"], tmp_path), batch=4, imgsz=[64, 96])
    assert report.passed
    assert sizes(report) == [(4, 64, 96)]
    assert report.rows[0].images == 8  # two of the six are used twice


@pytest.mark.parametrize(
    ("family", "arguments", "end2end", "checked_sizes"),
    [
        ("v26", {"nms": False, "dynamic": True}, "True", [(1, 160, 160), (3, 160, 160), (1, 96, 160), (3, 96, 160)]),
        ("v26", {"imgsz": 96}, "False", [(1, 96, 96)]),
        (
            "v8",
            {"nms": True, "dynamic": True, "batch": 2, "max_det": 9},
            "False",
            [(n, h, 160) for h in (160, 96) for n in (1, 2)],
        ),
    ],
)
def test_models_that_choose_their_boxes_themselves_pass(
    family: str,
    arguments: dict[str, Any],
    end2end: str,
    checked_sizes: list[Any],
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> None:
    report = export(shutil.copy(checkpoints[family], tmp_path), **arguments)
    assert report.passed
    assert sizes(report) == checked_sizes
    assert all(row.torch_detections == row.file_detections > 20 for row in report.rows)
    assert metadata(report.path)["end2end"] == end2end
    if family == "v26":
        assert not {"teacher", "method", "yolokd"} & metadata(report.path).keys()


@pytest.mark.parametrize("family", ["v8", "v26"])
def test_models_of_other_formats_that_choose_their_boxes_themselves_pass(
    family: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    report = export(shutil.copy(checkpoints[family], tmp_path / "m.pt"), format="torchscript", nms=True, imgsz=96)
    assert report.passed
    assert all(row.torch_detections == row.file_detections > 20 for row in report.rows)


@pytest.mark.parametrize(
    ("asked", "precision"),
    [
        ({"format": "torchscript"}, "float32"), ({"format": "torchscript", "quantize": 16}, "float16"),
        ({"format": "openvino"}, "reduced"), ({"format": "openvino", "quantize": 8}, "int8"),
        ({"format": "litert", "quantize": "w8a16"}, "int8"), *(({"format": form}, "int8") for form in INT8_ONLY),
    ],
)  # fmt: skip
def test_files_in_int8_are_calibrated_on_the_users_images(
    asked: dict[str, Any], precision: str, data: str, tmp_path: Path
) -> None:
    args = _check_options(asked)
    options = _calibration_options(args, data, tmp_path)
    assert _precision(args) == precision
    assert ("data" in options) == (precision == "int8")
    if options:
        listed = yaml.safe_load(Path(options["data"]).read_text())
        assert any(Path(options["data"]).parent.rglob("*.jpg"))
        assert dict(listed["names"]) == NAMES


def test_a_failed_download_is_no_full_disk(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_args: Any, **_keys: Any) -> None:
        raise ConnectionError("Download failure, environment is offline")

    monkeypatch.setattr(export_model.YOLO, "export", offline)
    with pytest.raises(UserError, match=r"format=onnx: a download failed: Download failure.* \(check the network\)"):
        export(checkpoints["v8"])


def test_an_end_to_end_model_is_not_checked_with_fewer_anchors_than_rows(
    checkpoints: dict[str, Path], data: str, tmp_path: Path
) -> None:
    report = export(shutil.copy(checkpoints["v26"], tmp_path), nms=False, dynamic=True, imgsz=64, simplify=False)
    assert report.passed
    assert {row.height for row in report.rows} == {64, 96}
    change_weight(report.path, "model.9.cv2.conv.weight", lambda weight: weight * np.float32(1.01))
    assert not any(row.passed for row in check(report.path, checkpoints["v26"], data).rows)


def test_a_float16_export_is_valid_and_has_wider_limits(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    report = export(shutil.copy(checkpoints["v8"], tmp_path), half=True)
    assert report.parity
    assert report.passed
    assert json.loads(report.parity.read_text())["precision"] == "float16"
    assert 1e-5 < report.rows[0].raw < 1e-2
    onnx.checker.check_model(onnx.load(report.path), full_check=True)


def test_other_formats_are_compared_with_the_runtime_that_is_at_hand(
    checkpoints: dict[str, Path], data: str, tmp_path: Path
) -> None:
    with captured_log() as lines:
        report = export(shutil.copy(checkpoints["v8"], tmp_path / "m.pt"), format="torchscript", imgsz=64, data=data)
    assert report.passed
    assert report.path == tmp_path / "m.torchscript"
    assert report.parity == tmp_path / "m.torchscript.parity.json"
    assert sizes(report) == [(1, 64, 64)]
    assert report.rows[0].torch_detections == report.rows[0].file_detections > 5
    assert json.loads(report.parity.read_text())["precision"] == "float32"
    assert torch.jit.load(report.path)(torch.zeros(1, 3, 64, 64)).shape == (1, 6, 84)
    log = "\n".join(lines)
    assert f"saved as '{report.path}'" in log
    assert PREFIX not in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.pt", "m.torchscript", "m.torchscript.parity.json"]


def test_an_onnx_file_made_on_the_way_to_another_format_replaces_none(
    copied: Path, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def exporter(module: Any, checkpoint: Path, options: Any, trust: bool) -> Path:
        checkpoint.with_suffix(".onnx").write_bytes(b"made on the way")
        return run_exporter(module, checkpoint, options, trust)

    run_exporter, before = export_model._run_exporter, copied.read_bytes()
    monkeypatch.setattr(export_model, "_run_exporter", exporter)
    export_into(copied.with_suffix(".pt"), checkpoints["v8"], None, False, {"format": "torchscript"})
    assert copied.read_bytes() == before
    assert copied.with_suffix(".torchscript").exists()


def test_a_wrong_file_of_another_format_fails_the_check(
    checkpoints: dict[str, Path], data: str, tmp_path: Path
) -> None:
    path = export(shutil.copy(checkpoints["v8"], tmp_path / "m.pt"), format="torchscript", imgsz=64).path
    module, _ = load_model(checkpoints["v8"], "model")
    module.model[9].cv2.conv.weight.data.mul_(1.01)
    report = verify(path, module, validation_images(data), Thresholds(), "float32")
    assert not any(row.passed for row in report.rows)
    path.write_bytes(path.read_bytes()[:5000])
    assert verify(path, module, validation_images(data), Thresholds(), "float32").problem


def test_a_format_other_than_onnx_needs_neither_a_data_set_nor_a_detector(data: str, tmp_path: Path) -> None:
    model = save_checkpoint(ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False), tmp_path / "cls.pt")
    with captured_log() as lines:
        report = export(model, format="torchscript", imgsz=32)
    assert report == ExportReport(path=tmp_path / "cls.torchscript")
    assert "will not be compared with the checkpoint: model=" in "\n".join(lines)


def test_an_int8_file_is_calibrated_on_training_images_and_compared(
    checkpoints: dict[str, Path], data: str, tmp_path: Path
) -> None:
    caches = list(Path(data).parent.rglob("*.cache"))
    with captured_log() as lines:
        report = export(shutil.copy(checkpoints["v8"], tmp_path / "m.pt"), imgsz=96, quantize=8)
    assert report.passed
    assert report.path == tmp_path / "m_int8.onnx"
    assert report.precision == "int8"
    assert 1e-3 < report.rows[0].scores < 0.9
    assert "found 12 images" in "\n".join(lines)
    assert list(Path(data).parent.rglob("*.cache")) == caches
    types = {tensor.data_type for tensor in onnx.load(report.path).graph.initializer}
    assert onnx.TensorProto.INT8 in types
    assert json.loads(metadata(report.path)["yolokd"]) == PROVENANCE


def test_an_int8_file_that_rounds_its_scores_to_zero_fails_the_check(
    checkpoints: dict[str, Path], data: str, tmp_path: Path
) -> None:
    """So it is if the decoded boxes and the scores share one scale, as they do without Ultralytics' list of nodes."""
    report = export(shutil.copy(checkpoints["v8"], tmp_path / "m.pt"), imgsz=96)
    module, _ = load_model(checkpoints["v8"], "model")
    graph = onnx.load(report.path)
    for node in graph.graph.node:
        node.output[:] = ["wide" if name == "output0" else name for name in node.output]
    graph.graph.initializer.append(numpy_helper.from_array(np.float32(5), "step"))
    graph.graph.initializer.append(numpy_helper.from_array(np.int8(0), "zero"))
    graph.graph.node.append(onnx.helper.make_node("QuantizeLinear", ["wide", "step", "zero"], ["rounded"]))
    graph.graph.node.append(onnx.helper.make_node("DequantizeLinear", ["rounded", "step", "zero"], ["output0"]))
    onnx.save(graph, report.path)
    (row,) = verify(report.path, module, validation_images(data), Thresholds()).rows
    assert row.scores > 0.9
    assert not row.passed


def assert_record_belongs_to_its_file(folder: Path, contents: Collection[bytes]) -> None:
    """Fail if the ONNX file is none of `contents`, or if a record lies beside a file that it was not written for."""
    file, record = folder / "best.onnx", folder / "best.parity.json"
    assert file.read_bytes() in contents
    if record.exists():
        assert json.loads(record.read_text())["sha256"] == sha256(file)


def write_pair(folder: Path, content: bytes) -> None:
    (folder / "best.onnx").write_bytes(content)
    record = {"passed": True, "sha256": sha256(folder / "best.onnx")}
    (folder / "best.parity.json").write_text(json.dumps(record))


def publish_pair(folder: Path, content: bytes) -> None:
    with staging_folder(folder / "best.pt") as staging:
        write_pair(staging, content)
        publish(staging)


def test_a_kill_at_any_moment_leaves_no_record_beside_a_file_that_it_was_not_written_for(tmp_path: Path) -> None:
    contents = [b"export 0"]
    write_pair(tmp_path, contents[0])
    for number in itertools.count(1):
        contents.append(f"export {number}".encode())
        status = fork_until_killed(publish_pair, tmp_path, contents[-1], number=number)
        assert_record_belongs_to_its_file(tmp_path, contents)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert number > 10
    assert (tmp_path / "best.onnx").read_bytes() == contents[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.onnx", "best.parity.json"]


@pytest.mark.slow
def test_an_export_killed_at_any_moment_leaves_the_old_files_or_the_new_ones(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copy(checkpoints["v8"], tmp_path / "best.pt")
    assert export(model, imgsz=64).passed
    for number in itertools.count(1):
        status = run_until_killed(export, model, number=number)
        assert (tmp_path / "best.parity.json").exists() or status != 0
        assert_record_belongs_to_its_file(tmp_path, [(tmp_path / "best.onnx").read_bytes()])
        onnx.checker.check_model(onnx.load(tmp_path / "best.onnx"), full_check=True)
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert number > 15
    assert sizes_of_record(tmp_path) == [(1, SIZE, SIZE)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.onnx", "best.parity.json", "best.pt"]


def sizes_of_record(folder: Path) -> list[tuple[int, int, int]]:
    rows = json.loads((folder / "best.parity.json").read_text())["rows"]
    return [(row["batch"], row["height"], row["width"]) for row in rows]


def copy_export(exported: ExportReport, checkpoint: Path, folder: Path) -> Path:
    """Copy a checkpoint, its ONNX file and its record into a folder; return the checkpoint's copy."""
    for file in (exported.path, exported.parity):
        shutil.copy(str(file), folder)
    return Path(shutil.copy(checkpoint, folder / "best.pt"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_leaves_the_old_file_and_its_record(
    plain: ExportReport, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """A limit on the size of this process's files stands for a full disk."""
    model = copy_export(plain, checkpoints["v8"], tmp_path)
    before = contents(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            export(model, imgsz=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path) == before


@pytest.mark.slow
def test_an_int8_export_leaves_the_float_file_and_its_record(
    plain: ExportReport, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Ultralytics writes best.onnx first, and removes it when best_int8.onnx is made."""
    model = copy_export(plain, checkpoints["v8"], tmp_path)
    before = contents(tmp_path)
    assert export(model, imgsz=64, quantize=8).path == tmp_path / "best_int8.onnx"
    after = contents(tmp_path)
    assert after.pop("best_int8.onnx")
    assert after.pop("best_int8.parity.json")
    assert after == before


def test_a_second_export_in_a_folder_waits_for_the_first(tmp_path: Path) -> None:
    entered = threading.Event()

    def second() -> None:
        with staging_folder(tmp_path / "best.pt"):
            entered.set()

    with staging_folder(tmp_path / "best.pt"):
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        assert not entered.wait(0.3)
    thread.join(10)
    assert entered.is_set()


def test_a_folder_that_was_exported_before_is_replaced(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with staging_folder(tmp_path / "best.pt") as staging:
            (staging / "best_openvino_model").mkdir()
            (staging / "best_openvino_model" / f"{content}.xml").write_text(content)
            publish(staging)
    assert [path.name for path in tmp_path.rglob("*")] == ["best_openvino_model", "new.xml"]


def test_a_folder_in_the_place_of_the_file_is_kept(tmp_path: Path) -> None:
    (tmp_path / "best.onnx").mkdir()
    with pytest.raises(UserError, match="Is a directory"):
        publish_pair(tmp_path, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["best.onnx"]


@pytest.mark.parametrize("key", ["names", "imgsz", "args", "end2end"])
def test_code_in_the_metadata_of_an_onnx_file_does_not_run(key: str, tmp_path: Path) -> None:
    """Ultralytics reads them in `yolokd val` and `yolokd predict`."""
    written = tmp_path / "written"
    metadata = METADATA | {"task": "detect", "batch": "1", key: f"open({str(written)!r}, 'w')"}
    model = load_yolo(write_network(tmp_path / "m.onnx", metadata=metadata))
    with pytest.raises(ValueError, match="malformed"):
        model.predict(np.zeros((64, 64, 3), np.uint8), imgsz=64, device="cpu", verbose=False)
    assert not written.exists()


def change_weight(path: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    graph = onnx.load(path)
    (weight,) = (tensor for tensor in graph.graph.initializer if tensor.name.endswith(name))
    weight.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(weight)), weight.name))
    onnx.save(graph, path)


@pytest.mark.parametrize("factor", [1.01, -1.0, np.nan])
def test_a_changed_weight_fails_the_check(factor: float, copied: Path, checkpoints: dict[str, Path], data: str) -> None:
    change_weight(copied, "model.9.cv2.conv.weight", lambda weight: weight * np.float32(factor))
    report = check(copied, checkpoints["v8"], data)
    assert not report.passed
    assert not any(row.passed for row in report.rows)
    assert report.parity
    assert json.loads(report.parity.read_text())["passed"] is False


def test_slightly_wrong_scores_fail_the_check(copied: Path, checkpoints: dict[str, Path], data: str) -> None:
    change_weight(copied, "cv3.0.2.bias", lambda bias: bias + np.float32(0.004))
    report = check(copied, checkpoints["v8"], data)
    assert report.rows[0].raw < 1e-4  # too small beside boxes that are hundreds of pixels wide
    assert report.rows[0].scores > 1e-4
    assert not report.passed


def test_wrong_classes_fail_the_check(copied: Path, checkpoints: dict[str, Path], data: str) -> None:
    for level in range(3):
        change_weight(copied, f"cv3.{level}.2.weight", lambda weight: weight[::-1].copy())
    (row,) = check(copied, checkpoints["v8"], data).rows
    assert row.torch_detections > 0
    assert row.worst_iou == 0
    assert not row.passed


@pytest.mark.parametrize("length", [0, 1000, 100_000])
def test_a_truncated_onnx_file_fails_the_check(
    length: int, copied: Path, checkpoints: dict[str, Path], data: str
) -> None:
    copied.write_bytes(copied.read_bytes()[:length])
    report = check(copied, checkpoints["v8"], data)
    assert not report.passed
    assert report.problem


def test_wrong_class_names_fail_the_check(copied: Path, checkpoints: dict[str, Path], data: str) -> None:
    graph = onnx.load(copied)
    onnx.helper.set_model_props(graph, metadata(copied) | {"names": "{0: 'cat', 1: 'dog'}"})
    onnx.save(graph, copied)
    report = check(copied, checkpoints["v8"], data)
    assert not report.passed
    assert "names" in str(report.problem)


def test_export_reports_a_failed_check_and_does_not_raise(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = Limits(raw=0, scores=0, iou=1, margin=1e-3, ties=False)
    monkeypatch.setattr(parity, "LIMITS", {"float32": nothing})
    report = export(shutil.copy(checkpoints["v8"], tmp_path), imgsz=64)
    assert not report.passed
    assert report.path.is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"dynamik": True}, ["dynamik", "did you mean dynamic?"]),
        ({"format": "onxx"}, ["format=onxx", "did you mean onnx?"]),
        ({"format": "exe42"}, ["format=exe42", "one of:", "openvino"]),
        ({"imgsz": "abc"}, ["imgsz=abc"]),
        ({"opset": 3}, ["opset>=9"]),
        ({"quantize": "w8a32"}, ["w8a32", "not supported"]),
        ({"data": "nowhere.yaml"}, ["data=nowhere.yaml", "existing"]),
    ],
)
def test_bad_arguments_are_refused_with_one_line(
    arguments: dict[str, Any], words: list[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = shutil.copy(checkpoints["v8"], tmp_path / "best.pt")
    with pytest.raises(UserError) as error:
        export(model, **arguments)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["best.pt"]


def test_missing_and_broken_models_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model=.*none\.pt"):
        export(tmp_path / "none.pt")
    broken = tmp_path / "broken.pt"
    broken.write_bytes(checkpoints["v8"].read_bytes()[:5000])
    with pytest.raises(UserError, match=r"model=.*broken\.pt"):
        export(broken)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pt"]


def test_models_other_than_detectors_are_refused(data: str, tmp_path: Path) -> None:
    model = save_checkpoint(ClassificationModel("yolov8n-cls.yaml", nc=2, verbose=False), tmp_path / "cls.pt")
    with pytest.raises(UserError, match="not a YOLO detector but a ClassificationModel"):
        export(model, data=data)


def test_a_missing_data_set_is_an_error_unless_another_is_given(
    checkpoints: dict[str, Path], data: str, tmp_path: Path
) -> None:
    content = torch.load(checkpoints["v8"], weights_only=False)
    gone = tmp_path / "gone.pt"
    torch.save(content | {"train_args": {"data": str(tmp_path / "gone.yaml"), "imgsz": 64}}, gone)
    with pytest.raises(UserError, match=r"gone\.yaml.*give data="):
        export(gone)
    torch.save(content | {"train_args": {"imgsz": 64}}, gone)
    with pytest.raises(UserError, match=r"names no data set.*give data="):
        export(gone)
    assert export(gone, data=data).passed


def test_validation_images_come_from_folders_and_lists(data: str, tmp_path: Path) -> None:
    root = Path(data).parent
    for name in ("a.jpg", "b.PNG"):
        cv2.imwrite(str(tmp_path / name), np.full((20, 30, 3), 7, np.uint8))
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "list.txt").write_text(f"./a.jpg\n{tmp_path / 'b.PNG'}\n\n")
    folder, as_list = str(root / "images" / "val"), str(tmp_path / "list.txt")
    for val, count in ((folder, 6), (as_list, 2), ([folder, as_list], 8), (str(root / "images" / "train"), 8)):
        config = tmp_path / "data.yaml"
        config.write_text(yaml.safe_dump({"train": folder, "val": val, "names": NAMES}))
        assert len(validation_images(str(config))) == count


def test_validation_images_in_linked_folders_are_used(data: str, tmp_path: Path) -> None:
    """Ultralytics follows links in a split's folder, too."""
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "site").symlink_to(Path(data).parent / "images" / "val", target_is_directory=True)
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump({"train": "val", "val": "val", "names": NAMES}))
    assert len(validation_images(str(config))) == 6


@pytest.mark.parametrize("channels", [1, 4])
def test_a_model_with_another_number_of_channels_passes(channels: int, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    rng = np.random.default_rng(0)
    for i in range(3):
        image = rng.integers(0, 255, (40, 60, channels), np.uint8)
        cv2.imwrite(str(tmp_path / "val" / f"{i}.png"), image)
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump({"train": "val", "val": "val", "names": NAMES, "channels": channels}))
    torch.manual_seed(0)
    model = DetectionModel(YOLOV8N, ch=channels, nc=len(NAMES), verbose=False)
    report = export(save_trained_checkpoint(model, str(config), tmp_path / "best.pt"))
    assert report.passed
    assert report.rows[0].images == 3


def test_a_split_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.jpg").write_bytes(b"no image")
    config = tmp_path / "data.yaml"
    config.write_text(yaml.safe_dump({"train": "val", "val": "val", "names": NAMES}))
    with pytest.raises(UserError, match="no readable validation image"):
        validation_images(str(config))
