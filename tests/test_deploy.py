"""`yolokd deploy`: sizes, scores, latencies and memory of a small detector in several formats."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers.cli import run_yolokd
from helpers.data import NAMES, write_dataset
from helpers.device import detect
from helpers.models import (
    YOLOV8N,
    YOLOV8S,
    calibrate,
    calibrated_detector,
    label_with,
    random_detector,
    save_trained_checkpoint,
)  # fmt: skip
from ultralytics import YOLO
from ultralytics.utils.cpu import CPUInfo

from yolokd.commands.apart import ProcessFailure
from yolokd.commands.deploy import ledger
from yolokd.commands.deploy.formats import Format, known_formats
from yolokd.commands.deploy.latency import LatencyRequest, measure_in_process
from yolokd.commands.deploy.run import run_deploy
from yolokd.commands.deploy.show import verdict
from yolokd.data.dataset import validation_images
from yolokd.errors import UserError
from yolokd.models.origin import versions
from yolokd.runtime.files import sha256

SIZE = 96
FORMATS = ("onnx", "onnx-float16", "onnx-int8", "openvino", "hailo-int8")


class Deployed(NamedTuple):
    """A deployment: the folder of a run, the keys of the command, and what it printed."""

    run: Path
    keys: dict[str, Any]
    done: subprocess.CompletedProcess[str]


def as_arguments(keys: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for key, value in keys.items()]


def rows(run: Path) -> dict[str, dict[str, str]]:
    with open(run / "deploy.csv", newline="", encoding="utf-8") as f:
        return {row["format"] if row["model"] == "student" else row["model"]: row for row in csv.DictReader(f)}


def make_run(root: Path) -> tuple[Path, dict[str, Any]]:
    """Make a run of a student that scores well, with a teacher that its distill.yaml names; return also the keys."""
    data = write_dataset(root / "data")
    images = validation_images(str(data))
    teacher = save_trained_checkpoint(calibrated_detector(YOLOV8S, images, SIZE), str(data), root / "big.pt")
    run = root / "run"
    (run / "weights").mkdir(parents=True)
    student = calibrated_detector(YOLOV8N, images, SIZE)
    student.yolokd = {"teacher": {"file": "big.pt", "sha256": sha256(teacher)}, "method": "dfd"}
    student.yolokd |= {"classes_map": {}, "teacher_channels": []}  # as a training writes settings that are not given
    label_with(student, data, SIZE, root / "labels.pt", rect=False)
    save_trained_checkpoint(student, str(data), run / "weights" / "best.pt")
    (run / "distill.yaml").write_text(yaml.safe_dump({"teacher": str(teacher)}))
    return run, {"model": run / "weights" / "best.pt", "imgsz": SIZE, "threads": 1}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    run, keys = make_run(tmp_path_factory.mktemp("deploy"))
    done = run_yolokd("deploy", *as_arguments(keys), f"formats={','.join(FORMATS)}", cwd=run.parent)
    return Deployed(run, keys, done)


def test_each_format_gets_a_row_with_size_score_latency_and_memory(deployed: Deployed) -> None:
    found = rows(deployed.run)
    # OpenVINO computes in bfloat16 where the CPU can; boxes of a random detector then change places.
    differing = {name for name in FORMATS[:-1] if found[name]["parity"] != "pass"}
    assert differing <= {"openvino"}
    assert deployed.done.returncode == len(differing), deployed.done.stderr
    assert deployed.done.stderr.strip() == ""
    assert list(found) == ["checkpoint", *FORMATS, "teacher"]
    for name in ("checkpoint", *FORMATS[:-1], "teacher"):
        row = found[name]
        assert not row["problem"]
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"])
        assert float(row["peak_mib"]) > 20
        assert int(row["runs"]) >= 20
        assert row["threads"] == "1"
        assert int(row["images"]) == 6
        assert name in deployed.done.stdout
    for name in FORMATS[:-1]:
        path = deployed.run / "deploy" / found[name]["file"]
        size = sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]))
        assert float(found[name]["megabytes"]) == pytest.approx(size / 1e6, abs=1e-5)
    assert float(found["onnx"]["peak_mib"]) < float(found["checkpoint"]["peak_mib"])  # it has no torch
    assert cv2.imread(str(deployed.run / "deploy.png")) is not None


def test_a_float_file_scores_as_its_checkpoint_and_differences_follow_from_the_scores(deployed: Deployed) -> None:
    found = rows(deployed.run)
    score = float(found["checkpoint"]["map"])
    assert score > 0.1
    assert float(found["onnx"]["map"]) == pytest.approx(score, abs=1e-3)
    for row in found.values():
        if row["map"]:
            assert float(row["difference"]) == pytest.approx(float(row["map"]) - score, abs=2e-5)
            by_class = json.loads(row["ap_by_class"])
            assert by_class.keys() == set(NAMES.values())
            assert row["worst_class"] == min(by_class, key=by_class.__getitem__)
            assert np.mean(list(by_class.values())) == pytest.approx(float(row["map"]), abs=1e-4)
    reference, int8 = (json.loads(found[name]["ap_by_class"]) for name in ("checkpoint", "onnx-int8"))
    losses = {name: int8[name] - reference[name] for name in reference}
    assert float(found["onnx-int8"]["most_lost"]) == pytest.approx(min(losses.values()), abs=1e-5)
    assert losses[found["onnx-int8"]["most_lost_class"]] == min(losses.values())


@pytest.mark.parametrize("name", ["onnx-int8", "openvino"])
def test_scores_are_those_of_ultralytics_on_the_same_file(name: str, deployed: Deployed, tmp_path: Path) -> None:
    row = rows(deployed.run)[name]
    settings = {"imgsz": SIZE, "batch": 1, "rect": False, "plots": False, "device": "cpu", "project": tmp_path}
    data = deployed.run.parent / "data" / "data.yaml"
    metrics = YOLO(deployed.run / "deploy" / row["file"], task="detect").val(data=data, **settings)
    assert float(row["map"]) == pytest.approx(metrics.box.map, abs=1e-5)


def test_the_device_script_runs_the_exported_files(deployed: Deployed) -> None:
    image = validation_images(str(deployed.run.parent / "data" / "data.yaml"))[0]
    counts = {}
    for name in FORMATS[:3]:
        detector = detect.Detector(deployed.run / "deploy" / rows(deployed.run)[name]["file"])
        assert detector.names == NAMES
        counts[name] = len(detector(image))
    assert counts["onnx"] > 0
    assert abs(counts["onnx-float16"] - counts["onnx"]) <= 1


def test_what_does_not_run_here_is_named_and_skipped(deployed: Deployed) -> None:
    row = rows(deployed.run)["hailo-int8"]
    assert row["problem"]
    assert row["map"] == ""
    assert f"hailo-int8: {row['problem']}" in deployed.done.stdout


def test_nothing_is_measured_twice_and_limits_refuse(deployed: Deployed, capsys: pytest.CaptureFixture[str]) -> None:
    before, formats = rows(deployed.run), ",".join(FORMATS[:3])
    keys = deployed.keys | {"model": str(deployed.keys["model"]), "formats": formats}
    assert run_deploy(**keys, limit=1.0)
    assert rows(deployed.run) == before
    loss = -float(before["onnx-int8"]["difference"])
    assert loss > 0
    assert not run_deploy(**keys, limit=loss / 2)
    shown = capsys.readouterr().out
    assert "refused" in shown
    assert f"lose more than limit={loss / 2:g}, or have no score: " in shown
    assert run_deploy(**keys, limit=loss + 1e-4)


def test_each_format_and_precision_has_a_file_of_its_own() -> None:
    """The exporter names its file after the checkpoint; it adds _int8 for some formats only."""
    checkpoint, formats = Path("best.pt"), known_formats().values()
    files = [(each.argument, each.checkpoint_name(checkpoint), _adds_int8(each)) for each in formats]
    assert len(set(files)) == len(files)
    assert known_formats()["onnx-int8"].checkpoint_name(checkpoint) == "best.pt"
    assert known_formats()["mnn-int8"].checkpoint_name(checkpoint) == "best_int8.pt"
    assert "imx" not in known_formats()  # Ultralytics exports it in INT8 alone


def _adds_int8(each: Format) -> bool:
    return each.precision == "int8" and each.argument in {"onnx", "openvino", "litert"}


def test_rows_of_other_versions_are_named(deployed: Deployed) -> None:
    found = list(ledger.read(deployed.run / "deploy.csv").values())
    assert ledger.other_versions(found, versions()) == ""
    assert ledger.other_versions(found, versions() | {"torch": "3.0"}) == f"torch {torch.__version__}"


def test_a_run_measured_otherwise_is_not_mixed_in(deployed: Deployed, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = deployed.keys | {"model": str(deployed.keys["model"]), "formats": "onnx"}
    before = (deployed.run / "deploy.csv").read_bytes()
    for change, words in (({"imgsz": 64}, "another image size, 96, not 64"), ({"threads": 2}, "number of threads")):
        with pytest.raises(UserError, match=words):
            run_deploy(**keys | change)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(CPUInfo, "name", lambda: "Cortex-A76")
        with pytest.raises(UserError, match=r"another processor, .+, not Cortex-A76"):
            run_deploy(**keys)
    other = str(deployed.run / "weights" / "last.pt")
    shutil.copy(deployed.keys["model"], other)
    torch.save(torch.load(other, weights_only=False) | {"date": "today"}, other)
    with pytest.raises(UserError, match=r"deploy\.csv: holds rows of another checkpoint"):
        run_deploy(**keys | {"model": other})
    assert (deployed.run / "deploy.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": None}, "model: is missing"),
        ({"model": "none.pt"}, "no such file"),
        ({"formats": "onxn"}, "formats=onxn: no such format (did you mean onnx?)"),
        ({"formats": "torchscript-int8"}, "formats=torchscript-int8: no such format"),
        ({"limit": -1}, "limit=-1"),
        ({"limt": 1}, "limt: unknown key (did you mean limit?)"),
        ({"data": "nowhere.yaml"}, "data=nowhere.yaml"),
        ({"teacher": "none.pt"}, "teacher=none.pt"),
        ({"baseline": "none.pt"}, "baseline=none.pt"),
        ({"threads": 0}, "threads=0"),
        ({"split": "test"}, "cannot be used"),
        ({"save_dir": "/dev/null/x"}, "save_dir=/dev/null/x: is not a writable folder"),
    ],
)
def test_wrong_keys_are_refused_before_anything_is_written(
    change: dict[str, Any], words: str, deployed: Deployed, tmp_path: Path
) -> None:
    keys = deployed.keys | {"model": str(deployed.keys["model"]), "save_dir": str(tmp_path / "out")} | change
    with pytest.raises(UserError) as error:
        run_deploy(**keys)
    assert words in str(error.value)
    assert not list(tmp_path.rglob("deploy*"))


def test_classes_other_than_the_data_sets_are_refused(deployed: Deployed, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "d", {0: "box", 1: "disc"})
    with pytest.raises(UserError, match="its classes are not those of the data set: box, disc"):
        run_deploy(model=str(deployed.keys["model"]), data=str(data), save_dir=str(tmp_path))


def test_files_that_are_in_the_way_are_kept(deployed: Deployed, tmp_path: Path) -> None:
    keys = {"model": str(deployed.keys["model"]), "save_dir": str(tmp_path), "formats": "onnx"}
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "best.onnx").write_text("mine")
    with pytest.raises(UserError, match=r"holds files, but there is no deploy\.csv"):
        run_deploy(**keys)
    (tmp_path / "deploy.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"was not written by `yolokd deploy`"):
        run_deploy(**keys)
    (tmp_path / "deploy.csv").unlink()
    (tmp_path / "deploy.csv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is a link"):
        run_deploy(**keys)
    assert (tmp_path / "deploy" / "best.onnx").read_text() == "mine"


def test_a_teacher_is_scored_with_the_classes_map_and_classes_have_the_data_sets_names(tmp_path: Path) -> None:
    run, keys = make_run(tmp_path)
    data = tmp_path / "data" / "data.yaml"
    data.write_text(yaml.safe_dump(yaml.safe_load(data.read_text()) | {"names": {0: "Disc", 1: "box"}}))
    content = torch.load(keys["model"], weights_only=False)
    content["model"].yolokd["classes_map"] = {"circle": "disc"}
    torch.save(content, keys["model"])
    content["model"].names = {0: "circle", 1: "box"}
    torch.save(content, tmp_path / "t.pt")
    keys |= {"model": str(keys["model"]), "formats": "torchscript", "teacher": str(tmp_path / "t.pt")}
    run_deploy(**keys)
    found = rows(run)
    assert float(found["checkpoint"]["map"]) > 0.1
    assert found["teacher"]["ap_by_class"] == found["checkpoint"]["ap_by_class"]
    for row in found.values():
        assert json.loads(row["ap_by_class"]).keys() == {"Disc", "box"}


def test_a_student_of_one_class_for_all_is_measured(tmp_path: Path) -> None:
    run, keys = make_run(tmp_path)
    content = torch.load(keys["model"], weights_only=False)
    model = random_detector(YOLOV8N, {0: "item"})
    calibrated = calibrate(model, validation_images(str(tmp_path / "data" / "data.yaml")), SIZE)
    content |= {"model": calibrated, "train_args": content["train_args"] | {"single_cls": True}}
    torch.save(content, keys["model"])
    run_deploy(**keys | {"model": str(keys["model"]), "formats": "torchscript"})
    assert rows(run)["torchscript"]["worst_class"] == "item"


def test_a_split_without_labels_is_named(tmp_path: Path) -> None:
    _, keys = make_run(tmp_path)
    for label in (tmp_path / "data" / "labels" / "val").iterdir():
        label.unlink()
    with pytest.raises(UserError, match="was not scored: the images of the split val have no labels"):
        run_deploy(**keys | {"model": str(keys["model"])})


def test_a_format_that_runs_but_was_not_scored_is_not_to_be_shipped(deployed: Deployed) -> None:
    row = ledger.read(deployed.run / "deploy.csv")["student", "onnx", ""]
    assert verdict(row, None) == "ok"
    assert (
        verdict(row.model_copy(update={"problem": "was not scored: no memory", "difference": None}), 0.1) == "unscored"
    )


def test_a_file_that_no_runtime_reads_is_a_failure_and_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"no network")
    with pytest.raises(ProcessFailure, match="Protobuf parsing failed"):
        measure_in_process(LatencyRequest(tmp_path / "x.onnx", (64, 64), 3, 1))


@pytest.mark.slow
def test_an_interrupted_deployment_goes_on(tmp_path: Path) -> None:
    run, keys = make_run(tmp_path)
    arguments = [*as_arguments(keys), "formats=onnx,openvino-int8"]
    process = subprocess.Popen([sys.executable, "-m", "yolokd.cli", "deploy", *arguments], cwd=tmp_path)
    while not (run / "deploy.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    before = ledger.read(run / "deploy.csv")
    done = run_yolokd("deploy", *arguments, cwd=tmp_path)
    assert done.returncode == 0
    after = ledger.read(run / "deploy.csv")
    assert before.items() <= after.items()
    assert len(after) == 4
    assert after["student", "openvino-int8", ""].parity == "pass"
