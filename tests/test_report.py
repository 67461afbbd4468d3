"""The report of a run: what it says, what it is made from, and that it is never worth the run."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from copy import deepcopy
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers.browser import opened
from helpers.data import write_dataset
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, calibrated_detector, random_detector, save_checkpoint
from helpers.reference import attention, disagreement
from helpers.results import rows, states_equal, weights
from helpers.runs import TINY, captured_log, distil, train_and_stop

from yolokd import UserError, YoloDistiller
from yolokd.commands.compare.ledger import LedgerRow, read
from yolokd.commands.compare.verdicts import verdicts
from yolokd.commands.report import result_sentence, run_report
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.report.facts import settings_tables
from yolokd.report.history import History, read_history
from yolokd.report.kept import NAME, Record, read_kept, write_kept
from yolokd.report.page import MAX_BYTES
from yolokd.report.plots import loss_plots
from yolokd.report.seen.detections import match
from yolokd.report.seen.samples import SAMPLES, Boxes, as_images, validation_samples
from yolokd.runtime.files import sha256

NASTY = "a<b>&$x$"
NAMES = {0: "disc", 1: NASTY}
REPORT = "report.html"


@dataclass(frozen=True)
class Reported:
    """A finished run whose teacher detects something, with its report."""

    folder: Path
    teacher: Path
    trainer: Any
    page: str


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Reported:
    root = tmp_path_factory.mktemp("report")
    data = write_dataset(root / "cells", NAMES, val=8)
    (root / "cells/images/val/7.jpg").write_bytes(b"broken")
    images = [cv2.imread(str(file)) for file in sorted((root / "cells/images/train").glob("*.jpg"))]
    teacher = save_checkpoint(calibrated_detector(YOLOV8S, images, 64), root / "t.pt")
    content = torch.load(teacher, weights_only=False)
    content["model"].names = NAMES
    torch.save(content, teacher)
    settings = TINY | {"data": str(data), "project": str(root), "name": "r", "epochs": 2, "report": True}
    trainer = distil(str(teacher), YOLOV8N, settings, "dfd+pdf", **{"pdf.distance": "l1"}).trainer
    return Reported(root / "r", teacher, trainer, (root / "r" / REPORT).read_text())


def text_of(page: str) -> str:
    """Return what a page shows as text, on one line."""
    return " ".join(unescape(re.sub(r"<style.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def test_the_first_sentence_holds_the_result(made: Reported) -> None:
    score, teacher = made.trainer.metrics["metrics/mAP50-95(B)"], made.trainer.teacher_score
    share = "0.356" if teacher is None else f"{teacher:.3f}"
    assert f"After 2 epochs on cells, yolov8n reaches mAP50-95 {score:.3f}" in text_of(made.page)
    assert share in text_of(made.page)


def test_the_page_names_teacher_versions_settings_pairing_and_skipped_images(made: Reported) -> None:
    shown = text_of(made.page)
    for part in (
        f"teacher t.pt SHA-256 {sha256(made.teacher)}", f"torch {torch.__version__}",
        "val images 8, 1 skipped as broken", "train images 12, none skipped", "classes paired: 2 of 2", "P3 8",
        "method dfd+pdf", "pdf.distance l1",
    ):  # fmt: skip
        assert part in shown
    assert str(made.folder.parent) not in made.page


def test_there_is_a_curve_for_each_loss_and_each_methods_pull_and_gain(made: Reported) -> None:
    titles = re.findall(r"<h3>(.*?)</h3>\s*<svg", made.page)
    losses = ["YOLO loss: boxes", "YOLO loss: classes", "YOLO loss: box distances", *LOSSES_OF_METHODS]
    balance = [f"{what} of {method}" for method in ("dfd", "pdf") for what in ("Pull", "Gains")]
    assert titles[-10:] == [*losses, *balance, "Where the teacher sees objects"]


LOSSES_OF_METHODS = [f"Distillation loss: {method}" for method in ("dfd", "pdf")]


def test_names_are_text_and_never_markup(made: Reported) -> None:
    assert "<b>&" not in made.page
    assert NASTY in text_of(made.page)


def test_the_same_report_is_made_again_from_the_runs_folder(made: Reported, capsys: pytest.CaptureFixture[str]) -> None:
    (made.folder / REPORT).unlink()
    assert run_report(run=str(made.folder), device="cpu") == made.folder / REPORT
    assert capsys.readouterr().out.strip() == str(made.folder / REPORT)
    assert (made.folder / REPORT).read_text() == made.page


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_opens_it_without_errors_or_requests(width: int, scheme: Any, made: Reported) -> None:
    file = made.folder / REPORT
    assert file.stat().st_size <= MAX_BYTES
    with opened(file, width, scheme) as visit:
        count, undecoded = visit.undecoded()
        assert visit.requests == [file.as_uri()]
        assert visit.complaints == []
        # the photographs, and their maps at three levels: two attentions and one richness, the rest before and after
        assert (count, undecoded) == (SAMPLES + SAMPLES * 3 * (3 + 4 + 2 + 1), 0)
        assert visit.overflow() <= 0
        maps = visit.page.locator(".at-P4").first
        assert not maps.is_visible()
        visit.page.locator("label[for=level-P4]").click()
        assert maps.is_visible()


def test_what_differs_follows_from_the_boxes() -> None:
    labels = boxes([(0.1, 0.1, 0.3, 0.3), (0.6, 0.6, 0.8, 0.8)], [0, 1])
    found = boxes([(0.1, 0.1, 0.3, 0.31), (0.6, 0.6, 0.8, 0.8), (0.1, 0.1, 0.31, 0.3)], [0, 0, 0])
    in_labels, in_found = match(labels, found)
    assert in_labels.tolist() == [True, False]
    assert in_found.sum() == 1  # two boxes of one object: one of them is right
    assert not in_found[1]  # of another class
    assert match(labels, found, ignore_classes=True)[0].tolist() == [True, True]


def boxes(corners: list[tuple[float, ...]], classes: list[int]) -> Boxes:
    return Boxes(np.array(corners, np.float32), np.array(classes), np.ones(len(classes), np.float32))


@dataclass(frozen=True)
class Failed:
    """A finished run whose report could not be written, its student before the training, and its warnings."""

    folder: Path
    trainer: Any
    initial: Any
    warnings: list[str]


@pytest.fixture(scope="module")
def failed(made: Reported, tmp_path_factory: pytest.TempPathFactory) -> Failed:
    folder, initial = tmp_path_factory.mktemp("failed") / "a run", []
    distiller = YoloDistiller(str(made.teacher), YOLOV8N, "fitnet")
    distiller.add_callback("on_train_start", lambda trainer: initial.append(deepcopy(trainer.ema.ema)))
    distiller.add_callback("on_train_epoch_end", lambda _: (folder / REPORT).mkdir())
    with captured_log() as lines:
        distiller.train(**SHORT, data=made.trainer.args.data, save_dir=str(folder), report=True)
    warnings = [line for line in lines if "report: " in line]
    return Failed(folder, distiller.trainer, initial[0], warnings)


SHORT = {**TINY, "epochs": 1, "check_teacher": False, "teacher_precision": "fp32"}
del SHORT["report"]


def test_a_report_that_fails_is_a_warning_with_the_command_that_makes_it(failed: Failed) -> None:
    (warning,) = failed.warnings
    assert warning.endswith(f"make it with: yolokd report run='{failed.folder}'")
    assert (failed.folder / "weights" / "best.pt").exists()
    assert failed.trainer.finished
    assert list(failed.folder.glob("weights/distill-*")) == []


def test_a_report_changes_nothing_of_the_training(failed: Failed, made: Reported) -> None:
    folder = failed.folder.parent / "without"
    keys = SHORT | {"data": made.trainer.args.data, "save_dir": str(folder), "report": False}
    trainer = distil(str(made.teacher), YOLOV8N, keys, "fitnet").trainer
    assert states_equal(weights(trainer), weights(failed.trainer))
    assert not {REPORT, NAME} & {path.name for path in folder.iterdir()}


def test_the_maps_before_the_training_are_those_of_the_equations(failed: Failed, made: Reported) -> None:
    (sample, *_) = validation_samples(failed.trainer.data, failed.trainer.args)
    models = torch.load(made.teacher, weights_only=False)["model"].float(), failed.initial
    outputs = [detector_teacher(model)(as_images(sample, 64), RequestedOutputs(logits=True)) for model in models]
    teacher, student = (output.maps[16][0].double().numpy() for output in outputs)
    logits = [output.logits[16][0].double().numpy() for output in outputs]
    before = {name: maps[0] for name, maps in read_kept(failed.folder).before["P4"].items()}
    disparity = abs(attention(teacher) - attention(student))
    assert before["student_attention"] == pytest.approx(attention(student), rel=2e-3)
    assert before["disparity"] == pytest.approx(disparity, abs=2e-3)
    assert (before["high"] == (disparity >= disparity.mean())).all()
    assert before["disagreement"] == pytest.approx(disagreement(*logits, "l2"), abs=1e-3)


@pytest.fixture
def settings(data: str, tmp_path: Path) -> dict[str, Any]:
    return SHORT | {"data": data, "save_dir": str(tmp_path / "run")}


@pytest.mark.slow
def test_an_end_to_end_student_of_two_teachers_that_was_resumed_has_one(
    settings: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    weak = save_checkpoint(random_detector(YOLOV8N, seed=2), tmp_path / "weak.pt")
    distiller = YoloDistiller([str(weak), teacher], YOLO26N, "fitnet")
    train_and_stop(distiller, settings | {"epochs": 2})
    before = (Path(settings["save_dir"]) / NAME).read_bytes()
    YoloDistiller().train(resume=settings["save_dir"])
    assert read_kept(Path(settings["save_dir"])).before.keys() == {"P3", "P4", "P5"}
    assert before != (Path(settings["save_dir"]) / NAME).read_bytes()  # the scores were added
    shown = text_of((Path(settings["save_dir"]) / REPORT).read_text())
    assert "yolo26n, taught by weak.pt, teacher.pt" in shown
    assert "teacher weak.pt SHA-256" in shown
    assert "attention" in shown
    assert "student, before" in shown
    assert "This run is not finished" not in shown


def test_a_run_without_teacher_validation_and_labels_has_one(settings: dict[str, Any], tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data.v2")
    for file in (data.parent / "labels" / "val").iterdir():
        file.write_text("")
    distil(None, YOLOV8N, settings | {"data": str(data), "val": False}, "none")
    folder = Path(settings["save_dir"])
    (folder / "deploy.csv").write_text("file,ms on <pi>,map\nbest.onnx,12.34567,0.5\n")
    (folder / "old").mkdir()
    (folder / "old" / "deploy.csv").write_text("file,map,sha256\nother.onnx,0.5,0a1b\n")
    (folder / NAME).unlink()
    page = run_report(run=str(folder)).read_text()
    shown = text_of(page)
    assert "without a teacher" in shown
    assert "Of 0 labelled objects" in shown
    assert "file ms on <pi> map best.onnx 12.35 0.5" in shown
    assert "other.onnx" not in shown
    assert "Maps before the training were not kept" in shown
    assert "Disparity" not in shown
    assert "Images" in shown


def test_files_that_have_moved_are_named_and_a_run_of_plain_ultralytics_needs_none(
    made: Reported, tmp_path: Path
) -> None:
    folder = tmp_path / "moved"
    shutil.copytree(made.folder, folder)
    config = yaml.safe_load((folder / "distill.yaml").read_text())
    (folder / "distill.yaml").write_text(yaml.safe_dump(config | {"teacher": "/gone/t.pt"}))
    with pytest.raises(UserError, match=r"teacher=/gone/t[.]pt: no such file"):
        run_report(run=str(folder))
    fewer = write_dataset(tmp_path / "fewer", names={0: "disc"})
    with pytest.raises(UserError, match="has 1 classes, and the student knows"):
        run_report(run=str(made.folder), data=str(fewer))
    (folder / "distill.yaml").unlink()
    assert "without a teacher" in text_of(run_report(run=str(folder)).read_text())


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({}, "give one of the two"), ({"run": ".", "csv": "c.csv"}, "give one of the two"),
        ({"run": "nothing"}, "is no folder of a run"), ({"rum": "."}, "unknown key"),
        ({"csv": "c.csv", "data": "d.yaml"}, "works with run="), ({"csv": "nothing.csv"}, "no such file"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work_are_named(
    keys: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=problem):
        run_report(**keys)


def broken_archives(folder: Path) -> dict[str, bytes]:
    """Return contents of a report.npz that are refused, by a part of the error."""
    path, contents = folder / NAME, {"is broken": b"no archive"}
    record = np.array(Record(images=["0.jpg"]).model_dump_json())
    for problem, arrays in {
        "another shape": {"record": record, "P3/disparity": np.zeros((2, 3, 3))},
        "allow_pickle": {"record": record, "P3/disparity": np.array([{}], dtype=object)},
        "images": {"record": np.array(json.dumps({"images": 7}))},
    }.items():
        np.savez(path, **arrays)
        contents[problem] = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("record.npy", b"0" * 2**27)
    return contents | {"more than a report needs": path.read_bytes()}


def test_a_broken_file_of_what_was_kept_is_refused_and_runs_no_code(tmp_path: Path) -> None:
    for problem, content in broken_archives(tmp_path).items():
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(UserError, match=problem):
            read_kept(tmp_path)


def test_what_was_kept_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert read_kept(tmp_path).before == {}
    record, maps = Record(images=["0.jpg"], teacher_score=0.5), {"P3": {"disparity": np.full((1, 2, 2), 0.25)}}
    write_kept(tmp_path, record, maps)
    assert read_kept(tmp_path).record == record
    assert (read_kept(tmp_path).before["P3"]["disparity"] == 0.25).all()


def test_the_history_counts_a_repeated_epoch_once_and_joins_files_of_other_columns(tmp_path: Path) -> None:
    (tmp_path / "results-to-1.csv").write_text("epoch,time,train/old_loss\n1,10,0.5\n")
    (tmp_path / "results.csv").write_text("epoch, time,metrics/mAP50-95(B)\n2,7,0.1\n2,9,0.2\n3,12,nan\n")
    history = read_history(tmp_path)
    assert history.epochs == [1, 2, 3]
    assert history.column("metrics/mAP50-95(B)")[1] == 0.2
    assert history.best_epoch() == 2
    assert history.seconds == 10 + 7 + 2 + 3


def test_the_rows_of_a_run_are_its_history(made: Reported) -> None:
    written, history = rows(made.folder), read_history(made.folder)
    for name in written[0]:
        assert history.column(name) == pytest.approx([row[name] for row in written], nan_ok=True)


def test_losses_of_other_heads_are_those_of_yolo() -> None:
    columns = {f"train/{name}_loss": [1.0] for name in ("box", "l1", "seg", "pose", "angle", "fitnet")}
    titles = [plot.title for plot in loss_plots(History([1], columns, 1.0), ["fitnet"])]
    assert titles[:-1] == ["YOLO loss: boxes", *(f"YOLO loss: {name}" for name in ("l1", "seg", "pose", "angle"))]
    assert titles[-1] == "Distillation loss: fitnet"


def test_a_run_that_goes_on_in_another_folder_with_another_method_has_a_report_that_says_so(
    settings: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    train_and_stop(YoloDistiller(method="none", student=YOLOV8N), settings | {"epochs": 2})
    elsewhere, keys = tmp_path / "elsewhere", {"teacher": teacher, "method": "fitnet", "force": True}
    YoloDistiller().train(resume=settings["save_dir"], save_dir=str(elsewhere), **keys)
    shown = text_of((elsewhere / REPORT).read_text())
    assert "yolov8n, taught by teacher.pt" in shown
    assert "Distillation loss: fitnet" in shown
    config = yaml.safe_load((elsewhere / "distill.yaml").read_text())
    assert (config["method"], config["model"], config["epochs"]) == ("fitnet", YOLOV8N, 2)


def test_settings_name_a_backbones_weights_without_their_folder() -> None:
    (changed, _) = settings_tables({"teacher": "timm:vit@/home/me/w.safetensors"})
    assert changed.rows == [["teacher", "timm:vit"]]


def test_the_report_of_a_comparison_is_one_page(tmp_path: Path) -> None:
    csv = Path(__file__).parents[1] / "runs/reference/compare/bccd-fresh.csv"
    page = run_report(csv=str(shutil.copy(csv, tmp_path)))
    assert "fitnet+pdf changes mAP50-95 by +0.0" in text_of(page.read_text())
    with opened(page, 390) as visit:
        assert (visit.requests, visit.complaints) == ([page.as_uri()], [])
        assert visit.overflow() <= 0


def test_a_comparison_that_closes_no_gap_does_not_say_that_it_does(tmp_path: Path) -> None:
    ledger = Path(__file__).parents[1] / "runs/reference/compare/bccd-fresh.csv"
    rows = list(read(ledger).values())
    better = [replace_score(row, "fitnet+pdf", 0.0) for row in rows]
    assert "it closes 57% (45% to 66%) of the gap" in result_sentence(*verdicts(better))
    worse = [replace_score(row, "fitnet+pdf", -0.1) for row in rows if row.method != "native"]
    assert "gap" not in result_sentence(*verdicts(worse))


def replace_score(row: LedgerRow, method: str, change: float) -> LedgerRow:
    return row.model_copy(update={"map": row.map + change * (row.method == method)})
