"""Students that are RT-DETRs: what they learn from, that their training is Ultralytics' own, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import ultralytics
from helpers.data import two_images
from helpers.models import RTDETR, YOLOV8N, save_checkpoint
from helpers.results import repeatable_rows, rows, saved_weights, states_equal, weights
from helpers.runs import TINY, train_and_stop
from torch import Tensor
from ultralytics.nn.tasks import RTDETRDetectionModel

from yolokd import UserError, YoloDistiller
from yolokd.commands.bench.candidate import BenchSetting, Candidate
from yolokd.config.parse import parse, split_keys
from yolokd.distillation.query_criterion import QueryCriterion
from yolokd.exporter.export_model import export
from yolokd.models.checkpoint import load_model
from yolokd.models.detector import read_pyramid
from yolokd.models.evaluate import score
from yolokd.models.tasks import TASKS, scored_task
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.pyramid.pairing import Pairing, pair_classes, pair_levels
from yolokd.runtime.threads import training_threads
from yolokd.training.plan import make_plan
from yolokd.training.settings import training_keys


def settings(data: str, teacher: str | None, folder: Path, **more: Any) -> dict[str, Any]:
    own = {"teacher": teacher, "method": "fitnet+sl2", "teacher_precision": "fp32", "check_teacher": False, "probe": 2}
    keys = {"data": data, "student": RTDETR, "save_dir": str(folder), "epochs": 2}
    return {**TINY, **keys, **(own if teacher else {"method": "none"}), **more}


@pytest.fixture(scope="module")
def run(data: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rtdetr") / "run"
    YoloDistiller().train(**settings(data, teacher, folder))
    return folder


def test_the_maps_that_enter_the_decoder_are_pulled_to_the_teachers(teacher: str) -> None:
    torch.manual_seed(0)
    student, model = RTDETRDetectionModel(RTDETR, nc=2, verbose=False), load_model(teacher, "teacher")[0]
    student.nc = 2  # the trainer sets it
    frozen, pyramid = detector_teacher(model), read_pyramid(student)
    pairing = Pairing(
        tuple(pair_levels(frozen.pyramid, pyramid)), tuple(pyramid), pair_classes(frozen.names, {0: "disc", 1: "box"})
    )
    config = parse({"teacher": "t.pt", "method": "fitnet", "balance": "off", "level_weights": "uniform"})
    student.criterion = criterion = QueryCriterion(student.train(), [(frozen, pairing)], config, seed=0)
    entered: list[Tensor] = []
    student.model[-1].register_forward_pre_hook(lambda _head, inputs: entered.extend(inputs[0]))
    batch = two_images()
    criterion.begin_step(batch["img"])
    total, own = student.loss(batch)
    method, maps = criterion.stage.methods[0], frozen(batch["img"]).maps
    expected = [
        float((adapter.adapt(m) - maps[stride]).detach().square().mean())
        for adapter, m, stride in zip(method, entered, pyramid, strict=True)
    ]
    assert criterion.items["fitnet_loss"] == pytest.approx(sum(expected) / 3, rel=1e-4)
    gain = float(criterion.stage.fixed_gains)
    assert criterion.items["fitnet_gain"] == pytest.approx(gain)
    assert set(own) == {"giou_loss", "cls_loss", "l1_loss"}
    assert float(total.detach()) > sum(map(float, own.values()))
    assert len(student.model[-1]._forward_pre_hooks) == 1  # that of this test


def test_a_run_has_the_columns_of_its_losses_and_of_its_methods(run: Path) -> None:
    first = rows(run)[0]
    for name in ("giou", "cls", "l1", "fitnet", "sl2"):
        assert first[f"train/{name}_loss"] > 0
    for level in ("P3", "P4", "P5"):
        assert first[f"level/{level}/fitnet_ratio"] > 0
    assert not any(name.startswith("val/fitnet") for name in first)


def test_the_checkpoint_is_ultralytics_own(run: Path) -> None:
    model = load_model(run / "weights" / "best.pt", "model")[0]
    assert type(model) is RTDETRDetectionModel
    assert {type(m).__module__.split(".")[0] for m in model.modules()} == {"ultralytics", "torch"}
    assert model.yolokd["method"] == "fitnet+sl2"


def test_an_export_that_would_not_be_checked_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="is not a YOLO detector but a RTDETRDetectionModel"):
        export(str(run / "weights" / "best.pt"))
    assert "yolokd export" not in (run / "weights" / "MODEL_CARD.md").read_text()


def test_without_a_teacher_it_trains_as_in_ultralytics(data: str, tmp_path: Path) -> None:
    keys = settings(data, None, tmp_path / "run", epochs=1)
    distiller = YoloDistiller()
    distiller.train(**keys)
    plain = ultralytics.RTDETR(RTDETR)
    plain.add_callback("on_train_start", lambda _: torch.set_num_threads(training_threads()))
    shared = {k: v for k, v in split_keys(keys).ultralytics.items() if k not in {"student", "save_dir"}}
    plain.train(**shared, save_dir=str(tmp_path / "plain"))
    assert states_equal(weights(distiller.trainer), weights(plain.trainer))


def test_a_resumed_run_ends_as_one_that_was_not_stopped(run: Path, data: str, teacher: str, tmp_path: Path) -> None:
    train_and_stop(YoloDistiller(), settings(data, teacher, tmp_path / "run"))
    YoloDistiller().train(resume=str(tmp_path / "run"))
    assert repeatable_rows(tmp_path / "run") == repeatable_rows(run)
    last = ("weights", "last.pt")
    assert states_equal(saved_weights(tmp_path.joinpath("run", *last)), saved_weights(run.joinpath(*last)))


@pytest.mark.parametrize("method", ["pdf", "bckd", "frs", "ld", "crosskd"])
def test_methods_that_need_scores_per_position_are_refused_by_name(
    method: str, data: str, teacher: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"has no class scores and boxes per position, which {method} needs"):
        make_plan(training_keys(settings(data, teacher, tmp_path, method=f"fitnet+{method}")))


def test_images_without_labels_are_refused(data: str, teacher: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unlabelled=.*: an RT-DETR's loss would count the objects"):
        make_plan(training_keys(settings(data, teacher, tmp_path, unlabelled=data)))


def test_a_yolo_is_scored_for_an_rtdetr_student(data: str, teacher: str, tmp_path: Path) -> None:
    settings = {"data": data, "imgsz": 64, "device": "cpu", "batch": 4}
    model = load_model(teacher, "teacher")[0]
    assert scored_task(model, TASKS["rtdetr"], {}) is TASKS["rtdetr"]
    assert score(model, settings, tmp_path, TASKS["rtdetr"]) == score(model, settings, tmp_path, TASKS["detect"])


def test_an_rtdetr_teaches_an_rtdetr_and_a_yolo(data: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RTDETRDetectionModel(RTDETR, nc=2, verbose=False)
    model.names = {0: "disc", 1: "box"}
    path = str(save_checkpoint(model, tmp_path / "rtdetr.pt"))
    for student in (RTDETR, YOLOV8N):
        plan = make_plan(training_keys(settings(data, path, tmp_path, method="fitnet+mgd", student=student)))
        assert [level.stride for level in plan.teachers[0].pairing.levels] == [8, 16, 32]


def test_bench_measures_its_steps(data: str, teacher: str, tmp_path: Path) -> None:
    keys = (("device", "cpu"), ("teacher_precision", "fp32"))
    setting = BenchSetting((teacher,), RTDETR, 64, 2, data, str(tmp_path), keys)
    seconds = Candidate(setting, "fitnet", amp=False).step()
    assert seconds.methods > 0
    assert seconds.teacher > 0
