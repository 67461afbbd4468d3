"""The model card beside best.pt: its metadata, scores and origin, and names that are not markup."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.data import write_dataset
from helpers.models import YOLOV8N
from helpers.runs import TINY, distil
from markdown_it import MarkdownIt
from markdown_it.token import Token
from ultralytics.utils.metrics import DetMetrics

from yolokd.models.origin import TeacherOrigin
from yolokd.runtime.files import sha256
from yolokd.training.results.model_card import card_content, model_card, without_folders

NASTY = "a|b\n<b>*x* [y](http://z) `c` &amp; ~~d~~"
SHOWN = "a|b <b>*x* [y](http://z) `c` &amp; ~~d~~"
NAMES = {0: "disc", 1: NASTY, 2: "never_seen"}  # the data set has no object of the last one
TEACHER = "t_|_<i>*1*.pt"


@pytest.fixture(scope="module")
def trainer(teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the trainer of a finished run whose teacher, data set and classes have names like markup."""
    folder = tmp_path_factory.mktemp("card")
    data = write_dataset(folder / "my_cells", {0: NAMES[0], 1: NAMES[1]})
    data.write_text(yaml.safe_dump({**yaml.safe_load(data.read_text()), "names": NAMES}))
    shutil.copy(teacher, folder / TEACHER)
    settings = {**TINY, "data": str(data), "project": str(folder), "epochs": 1, "check_teacher": False}
    return distil(str(folder / TEACHER), YOLOV8N, settings, "fitnet", lr0=0.02, level_floor=0.25).trainer


@pytest.fixture(scope="module")
def card(trainer: Any) -> str:
    return (trainer.wdir / "MODEL_CARD.md").read_text()


@pytest.fixture(scope="module")
def tokens(card: str) -> list[Token]:
    return parsed(card)


def parsed(card: str) -> list[Token]:
    """Return the card's text as a reader of Markdown understands it."""
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body(card))


def scored() -> DetMetrics:
    """Return Ultralytics' metrics of six images: half of the detections of one class are right, fewer of another."""
    metrics = DetMetrics(NAMES)
    for image in range(6):
        right = np.zeros((2, 10), dtype=bool)
        right[0, :4], right[1] = image % 2 == 0, image < 2
        detections = {"tp": right, "conf": np.array([0.9, 0.6 - image / 50]), "pred_cls": np.array([0.0, 1.0])}
        labels = {"target_cls": np.array([0.0, 1.0, 1.0]), "target_img": np.array([0.0, 1.0])}
        metrics.update_stats({**detections, **labels, "im_name": f"{image}.jpg"})
    metrics.process()
    return metrics


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def body(card: str) -> str:
    return card.split("---\n\n", 1)[1]


def table_rows(tokens: list[Token]) -> list[list[str]]:
    """Return the cells of the rows of all tables, as shown."""
    rows: list[list[str]] = []
    in_cell = False
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and in_cell:
            rows[-1].append("".join(child.content for child in token.children or []))
        in_cell = token.type in ("td_open", "th_open")
    return rows


def test_the_hub_reads_licence_library_task_and_scores(card: str, trainer: Any) -> None:
    metadata = front_matter(card)
    assert metadata["license"] == "agpl-3.0"
    assert metadata["library_name"] == "ultralytics"
    assert metadata["pipeline_tag"] == "object-detection"
    assert {"yolokd", "knowledge-distillation"} <= set(metadata["tags"])
    (model,) = metadata["model-index"]
    (result,) = model["results"]
    assert result["task"] == {"type": "object-detection"}
    assert result["dataset"] == {"type": "custom", "name": "my_cells", "split": "val"}
    assert [metric["name"] for metric in result["metrics"]] == ["precision", "recall", "mAP50", "mAP50-95"]


def test_the_scores_are_those_of_ultralytics(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = scored()
    monkeypatch.setattr(trainer.validator, "metrics", metrics)
    monkeypatch.setattr(trainer, "metrics", metrics.results_dict)
    card = model_card(card_content(trainer))
    (result,) = front_matter(card)["model-index"][0]["results"]
    scores = [metric["value"] for metric in result["metrics"]]
    assert scores == pytest.approx(metrics.mean_results(), abs=5.01e-4)
    assert min(scores) > 0.1
    rows = table_rows(parsed(card))
    assert ["all", "6", "18", *map(str, scores)] in rows
    for index, name in enumerate(("disc", SHOWN)):
        assert [name, "6", str(6 * (index + 1)), *(str(round(v, 3)) for v in metrics.class_result(index))] in rows


def test_the_card_names_the_teacher_the_settings_and_the_data(
    card: str, tokens: list[Token], trainer: Any, teacher: str
) -> None:
    rows = table_rows(tokens)
    assert [TEACHER, sha256(teacher), "fp32"] in rows
    for setting in (["method", "fitnet"], ["level_floor", "0.25"], ["epochs", "1"], ["imgsz", "64"]):
        assert setting in rows
    assert "12 images to train on, and 6 images with" in card


def test_the_card_scores_each_class_and_names_those_without_objects(tokens: list[Token], trainer: Any) -> None:
    rows = table_rows(tokens)
    metrics = trainer.validator.metrics
    for row, name in zip(metrics.summary(decimals=3), ("disc", SHOWN), strict=True):
        (shown,) = (cells for cells in rows if cells[0] == name)
        assert [float(cell) for cell in shown[1:]] == [
            float(row[column]) for column in ("Images", "Instances", "Box-P", "Box-R", "mAP50", "mAP50-95")
        ]
    (overall,) = (cells for cells in rows if cells[0] == "all")
    assert [int(cell) for cell in overall[1:3]] == [6, int(metrics.nt_per_class.sum())]
    (unmeasured,) = (t.content for t in tokens if t.type == "inline" and t.content.startswith("Classes without"))
    assert "never\\_seen" in unmeasured
    assert "disc" not in unmeasured


def test_names_are_shown_as_they_are_and_never_as_markup(tokens: list[Token]) -> None:
    inline = [child for token in tokens for child in token.children or []]
    assert {child.type for child in inline} <= {"text", "text_special", "code_inline", "softbreak"}
    assert not [token for token in tokens if token.type.startswith("html")]
    title = next(token for token in tokens if token.type == "inline")
    assert "".join(child.content for child in title.children or []) == f"yolov8n, taught by {TEACHER}"


def test_no_path_of_this_machine_is_in_the_card(card: str, trainer: Any) -> None:
    assert str(trainer.save_dir) not in card
    assert re.findall(r"(?<![\w.:/\\<])/\w+", card) == []


def test_a_setting_that_is_a_path_is_named_without_its_folder() -> None:
    assert without_folders({"a": "/home/me/x.pt", "b": "in/x.pt", "c": 1}) == {"a": "x.pt", "b": "in/x.pt", "c": 1}


def test_a_run_without_a_teacher_has_a_card_that_says_so(tiny: dict[str, Any]) -> None:
    d = distil(None, YOLOV8N, tiny | {"epochs": 1}, "none")
    card = (d.trainer.wdir / "MODEL_CARD.md").read_text()
    assert "without a teacher" in card
    assert "yolokd export" in card
    assert "knowledge-distillation" not in front_matter(card)["tags"]


def test_several_teachers_are_named_in_turn(trainer: Any) -> None:
    content = card_content(trainer)
    second = TeacherOrigin(file="second.pt", sha256="0" * 64, precision="fp32")
    rows = table_rows(parsed(model_card({**content, "teachers": [*content["teachers"], second]})))
    assert [second.file, second.sha256, "fp32"] in rows


@pytest.mark.parametrize("record", ["text", {"teacher": "text", "constants": 1}, {"teacher": [{"file": "a"}]}], ids=str)
def test_a_checkpoint_with_an_odd_record_has_a_card(
    record: object, trainer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    checkpoint = torch.load(trainer.best, weights_only=False)
    checkpoint["model"].yolokd = record
    torch.save(checkpoint, tmp_path / "best.pt")
    monkeypatch.setattr(trainer, "best", tmp_path / "best.pt")
    assert "without a teacher" in model_card(card_content(trainer))
