"""Several teachers at once: what each class and box is averaged over, what a run keeps of it, what it costs."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import two_images
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, pair, random_detector, save_checkpoint
from helpers.results import repeatable_rows, rows, saved_weights, states_equal
from helpers.runs import train_and_stop
from torch import Tensor
from ultralytics.cfg import get_cfg

from yolokd import UserError, YoloDistiller
from yolokd.commands.bench import run_bench
from yolokd.commands.bench.rounds import BenchRow, ensemble_costs
from yolokd.commands.check import print_check
from yolokd.config.parse import parse
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.distillation.predictions import Predictions, average_predictions
from yolokd.models.checkpoint import load_model
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.boxes import decode_distances
from yolokd.pyramid.level import LevelShape
from yolokd.pyramid.pairing import ClassPairing, Pairing
from yolokd.training.logs import level_weights
from yolokd.training.plan import make_plan
from yolokd.training.settings import training_keys

NAMES = ({0: "disc"}, {0: "box", 1: "disc", 2: "cloud"})  # the teachers' classes; the data set has disc and box


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return checkpoints of two families that know other classes."""
    folder, models = tmp_path_factory.mktemp("teachers"), (YOLOV8S, YOLO26N)
    detectors = [random_detector(cfg, names, seed) for seed, (cfg, names) in enumerate(zip(models, NAMES, strict=True))]
    return [str(save_checkpoint(d, folder / f"{name}.pt")) for d, name in zip(detectors, "ab", strict=True)]


def settings(data: str, teachers: list[str], folder: Path, **more: Any) -> dict[str, Any]:
    keys = {
        "imgsz": 64,
        "batch": 4,
        "nbs": 4,
        "plots": False,
        "verbose": False,
        "seed": 3,
        "device": "cpu",
        "epochs": 3,
    }
    own = {"teacher": teachers, "teachers": "ensemble", "teacher_precision": "fp32", "check_teacher": False, "probe": 2}
    return {**keys, **own, "method": "fitnet+bckd", "data": data, "student": YOLOV8N, "save_dir": str(folder), **more}


def probability(logit: Tensor) -> np.ndarray:
    return 1 / (1 + np.exp(-logit.double().numpy()))


def test_a_class_is_averaged_over_the_teachers_that_know_it_and_boxes_over_all() -> None:
    """The first teacher knows the student's classes 2 and 0, the second 0 and 1; at stride 16 the second is alone."""
    generator = torch.Generator().manual_seed(0)

    def draw(*channels: int) -> Tensor:
        return 4 * torch.randn(2, *channels, 3, 4, generator=generator)

    a = Predictions({8: draw(2)}, {}, {8: draw(4)}, {8: draw(4, 5)})
    b = Predictions({8: draw(2), 16: draw(2)}, {}, {8: draw(4), 16: draw(4)}, {8: draw(4, 5), 16: draw(4, 5)})
    of_a, of_b = average_predictions([a, b], [torch.tensor([2, 0]), torch.tensor([0, 1])], 3)
    shared = (probability(a.logits[8][:, 1]) + probability(b.logits[8][:, 0])) / 2
    expected = np.stack([probability(a.logits[8][:, 0]), shared], 1)
    np.testing.assert_allclose(probability(of_a.logits[8]), expected, atol=1e-6)
    np.testing.assert_allclose(
        probability(of_b.logits[8]), np.stack([shared, probability(b.logits[8][:, 1])], 1), atol=1e-6
    )
    torch.testing.assert_close(of_a.boxes[8], (a.boxes[8] + b.boxes[8]) / 2)
    distances = [decode_distances(p.box_logits[8].flatten(1, 2), bins=5) for p in (a, b, of_a)]
    torch.testing.assert_close(distances[2], (distances[0] + distances[1]) / 2)
    for name in ("boxes", "box_logits"):
        assert torch.equal(getattr(of_a, name)[8], getattr(of_b, name)[8])
    torch.testing.assert_close(of_b.logits[16], b.logits[16])
    torch.testing.assert_close(of_b.boxes[16], b.boxes[16])


def test_teachers_that_share_no_class_are_averaged_among_themselves_and_one_alone_stays_as_it_is() -> None:
    known, first, second = (Predictions({8: torch.full((1, 1, 2, 2), v)}) for v in (3.0, 2.0, -2.0))
    none = torch.tensor([], dtype=torch.long)
    averaged = average_predictions([first, known, second], [none, torch.tensor([1]), none], 2)
    assert averaged[1] is known
    for objectness in (averaged[0], averaged[2]):
        torch.testing.assert_close(objectness.logits[8], torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("logit", [500.0, -500.0])
def test_saturated_scores_stay_finite(logit: float) -> None:
    member = Predictions({8: torch.full((1, 1, 2, 2), logit)})
    averaged = average_predictions([member, member], [torch.tensor([0])] * 2, 1)
    assert torch.isfinite(averaged[0].logits[8]).all()
    assert bool((averaged[0].logits[8] > 0).all()) == (logit > 0)


def first_losses(teachers: list[Any], method: str) -> Tensor:
    """Return the losses of a first step, and check that each teacher ran once."""
    student = random_detector(seed=5)
    student.args = get_cfg()
    together = {"teachers": "ensemble"} if len(teachers) > 1 else {}
    names = [f"{i}.pt" for i in range(len(teachers))]
    config = parse({"teacher": names, "method": method, "balance": "off", "level_weights": "uniform", **together})
    pairs = [(detector_teacher(model), pair(model, student)) for model in teachers]
    runs: list[Teacher] = []
    for frozen, _ in pairs:
        vars(frozen)["_run"] = lambda *args, t=frozen, run=frozen._run: runs.append(t) or run(*args)
    criterion = DistillationCriterion(student.train(), pairs, config, seed=0)
    torch.manual_seed(0)
    batch = two_images()
    criterion.begin_step(batch["img"])
    losses, _ = criterion(student(batch["img"]), batch)
    assert runs == [frozen for frozen, _ in pairs]
    return losses


@pytest.mark.parametrize("method", ["bckd", "ld", "pkd"])
def test_a_teacher_beside_its_twin_teaches_as_it_does_alone(method: str) -> None:
    model = random_detector(YOLOV8S)
    twice, once = first_losses([model, model], method), first_losses([model], method)
    # The twins' adapters have initial weights of their own, so that losses of maps agree roughly.
    torch.testing.assert_close(twice, once, rtol=0.1 if method == "pkd" else 1e-4, atol=1e-6)
    assert not torch.equal(first_losses([model, random_detector(seed=9)], method)[3:], once[3:])


@pytest.fixture(scope="module")
def run(data: str, teachers: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ensemble") / "run"
    YoloDistiller().train(**settings(data, teachers, folder))
    return folder


def test_all_teachers_pull_together_as_hard_as_the_balance_says(run: Path) -> None:
    first = rows(run)[0]
    for method in ("fitnet", "bckd"):
        ratios = [first[f"level/{level}/{method}_ratio"] for level in ("P3", "P4", "P5")]
        assert np.mean(ratios) == pytest.approx(1, rel=0.3)
        assert first[f"train/{method}_loss"] > 0
    assert sum(first[f"level/{level}/share"] for level in ("P3", "P4", "P5")) == pytest.approx(1, abs=1e-4)


def test_the_weights_of_levels_are_a_mean_over_the_teachers_that_have_them() -> None:
    def stage(strides: list[int], weights: list[float]) -> Any:
        levels = tuple(LevelShape(stride, 4, 4) for stride in strides)
        pairing = Pairing(levels, (8, 16, 32), ClassPairing((), ()))
        return SimpleNamespace(pairing=pairing, level_weights=lambda: torch.tensor(weights))

    found = level_weights([stage([8, 16, 32], [0.5, 0.25, 0.25]), stage([16], [1.0])])
    assert found == pytest.approx({"P3": 0.25, "P4": 0.625, "P5": 0.125})


def test_a_run_names_all_its_teachers(run: Path, teachers: list[str]) -> None:
    record = load_model(run / "weights" / "best.pt", "model")[0].yolokd
    assert record["teachers"] == "ensemble"
    assert [origin["file"] for origin in record["teacher"]] == ["a.pt", "b.pt"]
    card = (run / "weights" / "MODEL_CARD.md").read_text()
    assert "it also learnt from several others at once, its teachers." in card
    assert all(origin["sha256"] in card for origin in record["teacher"])


@pytest.mark.slow
def test_a_resumed_ensemble_ends_as_one_that_was_not_stopped_and_keeps_its_teachers(
    run: Path, data: str, teachers: list[str], tmp_path: Path
) -> None:
    train_and_stop(YoloDistiller(), settings(data, teachers, tmp_path / "run"))
    other = save_checkpoint(random_detector(YOLO26N, NAMES[1], seed=7), tmp_path / "other.pt")
    with pytest.raises(UserError, match="is another than the run began with"):
        YoloDistiller().train(resume=str(tmp_path / "run"), teacher=[teachers[0], str(other)])
    YoloDistiller().train(resume=str(tmp_path / "run"))
    assert repeatable_rows(tmp_path / "run") == repeatable_rows(run)
    last = ("weights", "last.pt")
    assert states_equal(saved_weights(tmp_path.joinpath("run", *last)), saved_weights(run.joinpath(*last)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"teacher": "a.pt"}, "teachers=ensemble: needs several teachers"),
        ({"teacher": ["a.pt", "b.pt"], "stages": [3]}, "all teach from the first epoch on"),
        ({"teacher": ["a.pt", "b.pt"], "teachers": "both"}, "teachers=both: not a valid value"),
    ],
)
def test_settings_that_fit_no_ensemble_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse({"teachers": "ensemble", **keys})


def test_teachers_in_turn_refuse_a_training_whose_number_of_epochs_changes(
    data: str, teachers: list[str], tmp_path: Path
) -> None:
    keys = settings(data, teachers, tmp_path / "run") | {"time": 0.1}
    make_plan(training_keys(keys))
    with pytest.raises(UserError, match=re.escape("time=0.1: changes the number of epochs")):
        make_plan(training_keys(keys | {"teachers": "stages"}))


def test_check_says_that_all_teach_throughout(
    data: str, teachers: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    print_check(settings(data, teachers, tmp_path / "run"))
    told = " ".join(capsys.readouterr().out.split())
    for name in ("a.pt", "b.pt"):
        assert f"teacher {name}, which teaches throughout, in an ensemble" in told


@pytest.mark.slow
def test_bench_says_what_an_ensemble_costs(data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run_bench(
        teacher=f"{YOLOV8N},{YOLO26N}", teachers="ensemble", imgsz=32, batch=2, method="none,fitnet", rounds=1,
        data=data, project=str(tmp_path), memory=False, device="cpu",
    )  # fmt: skip
    with open(out / "bench.csv", encoding="utf-8") as f:
        measured = {row["teacher"] for row in csv.DictReader(f)}
    assert measured == {YOLOV8N, YOLO26N, f"{YOLOV8N}+{YOLO26N}"}
    assert re.search(
        r"fitnet \(amp=False\): the ensemble costs [\d.]+ s of a step, its teachers", capsys.readouterr().out
    )


def test_the_cost_is_that_of_teachers_and_losses() -> None:
    def row(teacher: str, seconds: float, methods: float, candidate: str = "fitnet") -> BenchRow:
        return BenchRow(teacher, 64, 2, candidate, "False", 1, 1.0, 1.0, 1.0, 2.0, 0.0, seconds, 0.5, methods)

    measured = [row("a+b", 0.3, 0.1), row("a", 0.2, 0.05), row("b", 0.2, 0.05), row("a", 9.0, 9.0, "native")]
    expected = "the ensemble costs 0.400 s of a step, its teachers alone 0.250 + 0.250 s: 80% of their sum"
    assert ensemble_costs(measured, ["a", "b"]) == [f"fitnet (amp=False): {expected}"]
