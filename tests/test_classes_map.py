"""`classes_map`: classes of the teacher that mean a class of the data set with another name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers.cli import run_forked
from helpers.data import two_images, write_dataset
from helpers.models import (
    YOLO26N,
    YOLOV8N,
    YOLOV8S,
    attach_criterion,
    calibrated_detector,
    label_with,
    random_detector,
    save_checkpoint,
)
from helpers.runs import TINY, train_one_epoch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import RTDETRDetectionModel

from yolokd import UserError, YoloDistiller, register
from yolokd.cli import parse_arguments
from yolokd.commands.compare.identity import (
    SCORE_NEUTRAL_KEYS,
    ComparisonRun,
    SharedContent,
    digest,
    teacher_hashes,
    training_hash,
)
from yolokd.commands.compare.plan import plan_runs
from yolokd.commands.compare.train_and_score import train_and_score
from yolokd.config.parse import merge_cfg_file, parse
from yolokd.data.dataset import boxes_per_class, load_data
from yolokd.methods import Method
from yolokd.models.disagreement import mean_disagreement
from yolokd.models.evaluate import aligned_copy
from yolokd.pyramid.level import Level, LevelShape
from yolokd.pyramid.pairing import ClassSelection, pair_classes
from yolokd.training.plan import make_plan
from yolokd.training.teachers import score_teachers

COCO = {0: "person", 1: "bicycle", 2: "car", 3: "sports car", 4: "dog"}
STREET = {0: "car", 1: "pedestrian", 2: "tree"}
MAP = {"person": "pedestrian", "sports car": "car"}
AS_TEXT = "classes_map={person: pedestrian, sports car: car}"


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_dataset(tmp_path_factory.mktemp("street"), STREET))


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_checkpoint(random_detector(YOLOV8S, COCO, seed=1), tmp_path_factory.mktemp("coco") / "coco.pt"))


@pytest.fixture(scope="module")
def run(street: str, coco: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with the map that was stopped after its first of two epochs."""
    folder = tmp_path_factory.mktemp("run") / "run"
    settings = {**TINY, "data": street, "epochs": 2, "check_teacher": False, "classes_map": MAP}
    return train_one_epoch(settings | {"save_dir": str(folder)}, coco, method="pdf")


# The pairing


def test_the_map_is_beside_pairing_by_name() -> None:
    pairing = pair_classes(COCO, STREET, MAP)
    assert pairing.student == (0, 1)
    assert pairing.teacher == ((2, 3), (0,))
    assert pairing.describe(STREET, COCO) == (
        "classes paired: 2 of 3 (car = car or sports car, pedestrian = person); unknown to the teacher: tree"
    )


def test_the_teacher_teaches_no_class_that_the_student_does_not_learn(street: str, coco: str) -> None:
    plan = make_plan({"teacher": coco, "model": YOLOV8N, "data": street, "classes": [1, 2], "classes_map": MAP})
    assert plan.teachers[0].pairing.classes.student == (1,)
    assert plan.names == {1: "pedestrian", 2: "tree"}


def test_a_class_in_the_map_is_not_paired_by_its_own_name() -> None:
    pairing = pair_classes({0: "Bus", 1: "van"}, {0: "bus", 1: "truck"}, {"bus ": "Truck"})
    assert (pairing.teacher, pairing.student) == (((0,),), (1,))


NAMES = st.sampled_from(["cat", "dog", "Dog", "cow", "pig"])


@given(
    st.dictionaries(st.integers(0, 6), NAMES, max_size=6),
    st.lists(st.sampled_from(["cat", "dog", "cow", "pet"]), unique=True),
    st.dictionaries(st.sampled_from(["cat", "dog", "cow", "pig"]), st.sampled_from(["cat", "pet", "cow"])),
)
def test_each_class_of_the_teacher_has_one_meaning(
    teacher: dict[int, str], student: list[str], classes_map: dict[str, str]
) -> None:
    expected: dict[int, set[int]] = {}
    seen = set()
    for index, name in teacher.items():
        if name.lower() not in seen:
            seen.add(name.lower())
            meaning = classes_map.get(name.lower(), name.lower())
            if meaning in student:
                expected.setdefault(student.index(meaning), set()).add(index)
    pairing = pair_classes(teacher, dict(enumerate(student)), classes_map)
    assert {i: set(group) for i, group in pairing.mapping.items()} == expected
    assert list(pairing.student) == sorted(expected)


def test_a_class_of_the_teacher_that_the_map_names_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"classes_map=.*names a class of the teacher twice"):
        pair_classes(COCO, STREET, {"person": "pedestrian", "Person": "tree"})


# What the losses see


def test_the_highest_logit_of_a_group_is_selected_and_gets_the_gradient() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 5, 3, 4))
    groups = [(2, 3), (0,), (4, 1, 2)]
    expected, gradient = np.empty((2, 3, 3, 4)), np.zeros_like(logits)
    for b, k, y, x in np.ndindex(*expected.shape):
        best = max(groups[k], key=lambda c: logits[b, c, y, x])
        expected[b, k, y, x] = logits[b, best, y, x]
        gradient[b, best, y, x] += k + 1
    for memory_format in (torch.contiguous_format, torch.channels_last):
        given = torch.tensor(logits).to(memory_format=memory_format).requires_grad_()
        selected = ClassSelection(groups)(given)
        (selected.sum((0, 2, 3)) * torch.arange(1, 4)).sum().backward()
        assert np.array_equal(selected.detach().numpy(), expected)
        assert np.allclose(given.grad.numpy(), gradient)  # type: ignore[union-attr]


@register("class_scores")
class ClassScores(Method):
    """Pulls the student's class logits to the teacher's."""

    wants_logits = True

    def __init__(self, shape: LevelShape) -> None:
        super().__init__()

    def forward(self, level: Level) -> Tensor:
        assert level.student_logits is not None
        assert level.teacher_logits is not None
        return (level.student_logits - level.teacher_logits).square().mean()


def raw_logits(model: torch.nn.Module, images: Tensor) -> np.ndarray:
    """Return the class logits of all positions, (B, classes, positions), of the one-to-many branch."""
    with torch.no_grad():
        raw = model.eval()(images)[1]
    return raw.get("one2many", raw)["scores"].double().numpy()


@pytest.mark.parametrize("student_cfg", [YOLOV8N, YOLO26N])
def test_a_loss_compares_the_channels_that_the_map_pairs(student_cfg: str) -> None:
    teacher, student = random_detector(YOLOV8S, COCO, seed=1), random_detector(student_cfg, STREET)
    for module in (*teacher.model[-1].cv3, *student.model[-1].cv3):
        torch.nn.init.normal_(module[-1].weight, std=0.3)  # so that classes differ at each position
    batch = two_images()
    t, s = raw_logits(teacher, batch["img"]), raw_logits(student, batch["img"])
    student.args = get_cfg()
    criterion = attach_criterion(teacher, student, method="class_scores", balance="off", classes_map=MAP)
    student.eval()
    student.model[-1].training = True  # raw predictions as in a training, but BatchNorm as in `raw_logits`
    criterion.begin_step(batch["img"])
    with torch.no_grad():
        losses = criterion(student(batch["img"]), batch)[0]
    error = np.stack([np.maximum(t[:, 2], t[:, 3]) - s[:, 0], t[:, 0] - s[:, 1]], 1) ** 2
    levels = np.split(error, np.cumsum([8 * 8, 4 * 4]), 2)  # 64 pixels at the strides 8, 16 and 32
    expected = np.mean([level.mean() for level in levels]) * len(t) * float(criterion.stage.fixed_gains)
    assert (np.maximum(t[:, 2], t[:, 3]) > t[:, 2]).any()
    assert float(losses[-1]) == pytest.approx(expected, rel=1e-3)


# Scores of the teacher, and D_pred


def test_the_highest_score_of_a_group_is_that_of_the_data_sets_class() -> None:
    model, images = random_detector(YOLOV8S, COCO, seed=1), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        theirs = model(images)[0][0].numpy()
        ours = aligned_copy(model, STREET, pair_classes(COCO, STREET, MAP).mapping)(images)[0][0].numpy()
    scores = theirs[4:]
    expected = np.stack([np.maximum(scores[2], scores[3]), scores[0], np.zeros_like(scores[0])])
    assert np.allclose(ours, np.concatenate([theirs[:4], expected]), atol=1e-5)


def test_an_rtdetr_gives_a_box_once_for_each_class_of_the_data_set() -> None:
    torch.manual_seed(0)
    model, images = RTDETRDetectionModel("rtdetr-l.yaml", nc=3, verbose=False).eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        theirs = model(images)[0][0].tolist()
        ours = aligned_copy(model, {0: "a", 1: "b"}, {0: (0, 1), 1: (2,)})(images)[0][0].tolist()
    expected: dict[tuple[float, ...], float] = {}
    for *box, score, label in theirs:  # the highest score first
        expected.setdefault((*box, {0: 0, 1: 0, 2: 1}[int(label)]), score)
    assert len(expected) < len(theirs)
    found = [((*box, label), score) for *box, score, label in ours if score > 0]
    assert len(found) == len(expected)
    assert dict(found) == expected


@pytest.fixture(scope="module")
def detecting(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """Return a data set, a teacher that scores well on it, and that teacher with another name for `disc`."""
    folder = tmp_path_factory.mktemp("detecting")
    data = write_dataset(folder / "d")
    images = [cv2.imread(str(path)) for path in sorted((data.parent / "images" / "val").glob("*.jpg"))]
    model = calibrated_detector(YOLOV8S, images, 192)
    label_with(model, data, 192, folder / "t.pt")
    model.names = {0: "ball", 1: "box"}
    return str(data), str(folder / "t.pt"), str(save_checkpoint(model, folder / "ball.pt"))


def test_the_teacher_is_scored_on_the_classes_that_it_is_said_to_know(
    detecting: tuple[str, str, str], tmp_path: Path
) -> None:
    data, same, other = detecting
    common = {"data": data, "model": YOLOV8N, "imgsz": 192, "device": "cpu", "workers": 0}
    keys = [{"teacher": same}, {"teacher": other}, {"teacher": other, "classes_map": {"ball": "disc"}}]
    plans = [make_plan(common | given) for given in keys]
    first, unknown, mapped = (score_teachers(p, p.args, torch.device("cpu"), 3, tmp_path) for p in plans)
    assert mapped == first
    assert unknown != first


def test_d_pred_compares_the_classes_that_the_map_pairs(street: str, tmp_path: Path) -> None:
    teacher, student = random_detector(YOLOV8S, COCO, seed=1), random_detector(YOLOV8N, STREET)
    settings = {"data": street, "imgsz": 64, "batch": 2, "device": "cpu", "split": "val"}
    by_name = mean_disagreement(teacher, student, settings, tmp_path)
    renamed = random_detector(YOLOV8S, {**COCO, 0: "pedestrian"}, seed=1)
    expected = mean_disagreement(renamed, student, settings, tmp_path)
    assert mean_disagreement(teacher, student, settings, tmp_path, {"person": "pedestrian"}) == expected != by_name


# The plan, and what `check` says


def plan(street: str, teacher: Any, classes_map: Any) -> Any:
    return make_plan({"teacher": teacher, "model": YOLOV8N, "data": street, "imgsz": 64, "classes_map": classes_map})


@pytest.mark.parametrize(
    ("classes_map", "message"),
    [
        ({"persn": "pedestrian"}, r"the teacher has no class 'persn' \(did you mean person\?\)"),
        ({"person": "pedestrain"}, r"the data set has no class 'pedestrain' \(did you mean pedestrian\?\)"),
        ({"persn": "car", "xyzzy": "car"}, r"no class 'persn' or 'xyzzy' \(did you mean person\?\)"),
        ({"xyzzy": "car"}, r"no class 'xyzzy' \(its classes: person, bicycle, car, sports car, dog\)"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_ones(
    classes_map: dict[str, str], message: str, street: str, coco: str
) -> None:
    with pytest.raises(UserError, match=rf"^classes_map: .*{message}"):
        plan(street, coco, classes_map)


def test_each_teacher_takes_the_names_that_it_has(street: str, coco: str, tmp_path: Path) -> None:
    other = str(save_checkpoint(random_detector(YOLOV8S, {0: "oak", 1: "car"}), tmp_path / "other.pt"))
    planned = plan(street, [other, coco], {"person": "pedestrian", "oak": "tree"})
    assert [p.pairing.classes.mapping for p in planned.teachers] == [{0: (1,), 2: (0,)}, {0: (2,), 1: (0,)}]
    with pytest.raises(UserError, match=r"classes_map: the teacher has no class 'elm'"):
        plan(street, [other, coco], {"person": "pedestrian", "elm": "tree"})


def test_check_shows_the_pairing_and_the_share_of_known_boxes(street: str, coco: str, tmp_path: Path) -> None:
    labels = (Path(street).parent / "labels" / "train").glob("*.txt")
    classes = Counter(int(line.split()[0]) for label in labels for line in label.read_text().splitlines())
    known, total = classes[0] + classes[1], classes.total()
    assert 0 < known < total
    (tmp_path / "cwd").mkdir()
    command = ("check", f"teacher={coco}", f"student={YOLOV8N}", f"data={street}", AS_TEXT, "imgsz=64", "device=cpu")
    done = run_forked(*command, cwd=tmp_path / "cwd")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "classes paired: 2 of 3 (car = car or sports car, pedestrian = person)" in text
    assert f"a class that teacher coco.pt knows: {known} of {total} ({known / total:.0%})" in text
    assert list((tmp_path / "cwd").iterdir()) == []


def test_boxes_are_counted_as_the_training_has_them(street: str) -> None:
    def count(**settings: Any) -> Counter[int]:
        args = get_cfg(overrides={"data": street, **settings})
        return boxes_per_class(load_data(street, bool(args.single_cls)), args)

    every = count()
    assert every.keys() == STREET.keys()
    assert count(single_cls=True) == {0: every.total()}
    assert count(classes=[1]) == {1: every[1]}
    assert 0 < count(fraction=0.5).total() < every.total()


# Settings


def test_the_command_line_and_python_give_the_same_configuration(tmp_path: Path) -> None:
    keys = {"teacher": "t.pt"}
    expected = parse(keys | {"classes_map": MAP})
    texts = ("{person: pedestrian, sports car: car}", '{"person": "pedestrian", "sports car": "car"}')
    for text in texts:
        assert parse(keys | parse_arguments([f"classes_map={text}"])) == expected
        (tmp_path / "my.yaml").write_text(f"classes_map: {text}\n")
        assert parse(merge_cfg_file({"cfg": tmp_path / "my.yaml", **keys})) == expected
    assert parse(expected.flat()) == expected
    assert parse(keys | parse_arguments(["classes_map=none"])).classes_map is None
    assert parse(keys | parse_arguments(["classes_map={no: 7}"])).classes_map == {"no": "7"}


def test_a_run_keeps_its_map_in_files_and_in_a_resume(run: Path) -> None:
    assert yaml.safe_load((run / "distill.yaml").read_text())["classes_map"] == MAP
    with pytest.raises(UserError, match="classes_map: cannot change in a resumed run"):
        YoloDistiller().train(resume=str(run), classes_map={"person": "car"})
    resumed = YoloDistiller()
    resumed.train(resume=str(run), classes_map=MAP)
    assert resumed.trainer is not None
    assert resumed.trainer.epoch == 1
    assert resumed.trainer.plan.teachers[0].pairing.classes.mapping == {0: (2, 3), 1: (0,)}
    assert resumed.trainer.args.classes_map == MAP
    assert resumed.model.model.yolokd["classes_map"] == MAP


# Comparisons


CONTENT = SharedContent({"epochs": 2}, "data", "scored", "student", ("teacher",), "")


def test_without_a_map_the_identity_of_runs_is_that_of_earlier_versions() -> None:
    config = parse({"teacher": "t.pt", "method": "dfd"})
    new = {*SCORE_NEUTRAL_KEYS, "teacher", "unlabelled", "unlabelled_ratio"}
    new |= {"classes_map", "teachers", "levels", "teacher_channels"}
    old = {k: v for k, v in config.flat().items() if k not in new}
    identity = {"method": "dfd", "settings": {"epochs": 2}, "data": "data", "student": "student"}
    assert training_hash("dfd", CONTENT, config) == digest(identity | {"teacher": ("teacher",), "distillation": old})
    assert teacher_hashes({}, CONTENT, "val")[0] == digest({"teacher": "teacher", "imgsz": 640})


def test_a_map_is_part_of_the_identity_of_runs_with_a_teacher(street: str, coco: str, tmp_path: Path) -> None:
    def runs(**keys: Any) -> list[ComparisonRun]:
        common = {"teacher": coco, "student": YOLOV8N, "data": street, "imgsz": 64, "epochs": 1, "device": "cpu"}
        return plan_runs(["none", "native", "fitnet"], 0, "val", tmp_path, common | keys)[0]

    without, mapped = runs(), runs(classes_map=MAP)
    assert [run.method for run in mapped] == ["teacher", "none", "native", "fitnet"]
    assert [a.config == b.config for a, b in zip(without, mapped, strict=True)] == [False, True, True, False]
    assert [a.ground == b.ground for a, b in zip(without, mapped, strict=True)] == [True] * 4
    assert mapped[3].keys["classes_map"] == MAP
    with pytest.raises(UserError, match="classes_map: has no effect on method=none,native"):
        plan_runs(["none", "native"], 0, "val", tmp_path, {"teacher": coco, "data": street, "classes_map": MAP})


def test_a_comparison_scores_the_teacher_by_the_map(detecting: tuple[str, str, str], tmp_path: Path) -> None:
    data, same, other = detecting
    common = {"student": YOLOV8N, "data": data, "imgsz": 192, "batch": 3, "epochs": 1, "device": "cpu", "workers": 0}
    scores = []
    for keys in ({"teacher": same}, {"teacher": other, "classes_map": {"ball": "disc"}}):
        run = plan_runs(["fitnet"], 0, "val", tmp_path, common | keys)[0][0]
        run.folder.mkdir(parents=True)
        train_and_score(run, "cpu")
        scores.append(yaml.safe_load(run.scores_path.read_text()))
    assert scores[0] == scores[1]
    assert scores[0]["map"] > 0
