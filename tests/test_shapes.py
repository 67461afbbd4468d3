"""The embedded data set: equal bytes for equal seeds, exact labels, and never an incomplete set."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from ultralytics.data.utils import check_det_dataset

from yolokd.data import shapes
from yolokd.errors import UserError

COUNTS = {"train": 12, "val": 8, "test": 8}


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shapes.ensure(root=tmp_path_factory.mktemp("shapes"), counts=COUNTS)


def contents(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_labels(card: Path, split: str) -> np.ndarray:
    return np.concatenate([np.loadtxt(file, ndmin=2) for file in labels_with_boxes(card, split)])


def labels_with_boxes(card: Path, split: str) -> list[Path]:
    return [file for file in sorted((card.parent / "labels" / split).iterdir()) if file.stat().st_size]


def test_the_same_seed_gives_the_same_bytes(card: Path, tmp_path: Path) -> None:
    again = shapes.ensure(root=tmp_path, counts=COUNTS)
    assert contents(again.parent) == contents(card.parent)
    assert len(contents(card.parent)) == 1 + 2 * sum(COUNTS.values())


def test_the_drawing_of_this_version_has_not_changed(card: Path) -> None:
    """If you change the images, raise the version and these values: otherwise users keep the set drawn before."""
    labels = b"".join(path.read_bytes() for path in sorted((card.parent / "labels").rglob("*.txt")))
    light = np.mean([cv2.imread(str(path)).mean() for path in (card.parent / "images").rglob("*.jpg")])
    assert (shapes._VERSION, hashlib.sha256(labels).hexdigest()[:16]) == (2, "0f0045fa4e9eb6db")
    assert light == pytest.approx(116.8, abs=0.5)  # JPEG bytes differ between versions of OpenCV


def test_another_seed_changes_every_image(card: Path) -> None:
    other = shapes.ensure(seed=1, root=card.parent.parent, counts=COUNTS)
    images = {digest for name, digest in contents(card.parent).items() if name.endswith(".jpg")}
    assert len(images) == sum(COUNTS.values())
    assert images.isdisjoint(contents(other.parent).values())


def test_an_image_does_not_depend_on_the_number_of_others(card: Path, tmp_path: Path) -> None:
    fewer = contents(shapes.ensure(root=tmp_path, counts={"val": 2, "train": 3}).parent)
    assert all(contents(card.parent)[name] == digest for name, digest in fewer.items() if name != "data.yaml")


def test_the_second_call_draws_nothing(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_generate", None)
    assert shapes.ensure(root=card.parent.parent, counts=COUNTS) == card


def test_the_set_is_kept_in_the_users_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes.platformdirs, "user_data_path", lambda app: tmp_path / app)
    assert shapes.ensure(counts=COUNTS).is_relative_to(tmp_path / "yolokd")


@pytest.mark.parametrize("split", COUNTS)
def test_every_split_has_every_class_and_boxes_inside_the_image(card: Path, split: str) -> None:
    labels = read_labels(card, split)
    low, high = labels[:, 1:3] - labels[:, 3:] / 2, labels[:, 1:3] + labels[:, 3:] / 2
    assert set(labels[:, 0]) == set(range(len(shapes.CLASSES)))
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
    assert labels[:, 3:].min() > 0.02


def test_images_are_three_channel_jpegs_of_the_stated_size(card: Path) -> None:
    for file in (card.parent / "images").rglob("*.jpg"):
        assert cv2.imread(str(file), cv2.IMREAD_UNCHANGED).shape == (shapes.SIZE, shapes.SIZE, 3)


@pytest.mark.parametrize("number", range(20))
def test_a_box_bounds_the_visible_part_of_its_object(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    painted = []

    def paint_flat(rng: np.random.Generator, image: np.ndarray, thing: shapes._Shape, light: complex) -> np.ndarray:
        painted.append(thing)
        return np.where(thing.cover >= 0.5, len(painted), image)

    monkeypatch.setattr(shapes, "_surface", lambda *args, **kwargs: np.zeros((shapes.SIZE, shapes.SIZE)))
    monkeypatch.setattr(shapes, "_paint", paint_flat)
    monkeypatch.setattr(shapes, "_photograph", lambda rng, image, light: image)
    image, labels = shapes._draw_image(np.random.default_rng(number))
    expected = []
    for index, thing in reversed(list(enumerate(painted, start=1))):
        rows, columns = np.nonzero(image == index)
        left, top, right, bottom = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        box = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
        if thing.name in shapes.CLASSES:
            expected.append([shapes.CLASSES.index(thing.name), *np.array(box) / shapes.SIZE])
    np.testing.assert_allclose(np.loadtxt(io.StringIO(labels), ndmin=2), expected, atol=1e-6)


@pytest.mark.parametrize("number", range(20))
def test_every_object_is_visible_enough(number: int) -> None:
    things = list(shapes._scene(np.random.default_rng(number)))
    for before, thing in enumerate(things):
        nearer = np.any([other.cover >= 0.5 for other in things[:before]], axis=0)
        assert not (thing.visible & nearer).any()
        assert thing.visible.sum() >= shapes._MIN_VISIBLE * (thing.cover >= 0.5).sum()


@pytest.mark.parametrize("number", range(5))
def test_painting_an_object_changes_its_visible_pixels_and_no_distant_ones(number: int) -> None:
    rng = np.random.default_rng(number)
    thing = next(shapes._scene(rng))
    ground = np.full((shapes.SIZE, shapes.SIZE, 3), 5, np.float32)  # brighter than any thing can be
    change = np.abs(shapes._paint(rng, ground, thing, light=1j) - ground).max(2)
    rows, columns = np.mgrid[: shapes.SIZE, : shapes.SIZE]
    assert (change[thing.visible] > 1).all()
    assert change[np.hypot(columns - thing.centre.real, rows - thing.centre.imag) > 2.5 * thing.radius].max() < 0.1


@pytest.mark.parametrize("name", shapes.CLASSES)
def test_only_rings_have_a_hole(name: str) -> None:
    lines = [line * 50 + complex(64, 64) for line in shapes._outlines(np.random.default_rng(0), name)]
    assert (shapes._fill(lines)[64, 64] == 0) == (name == "ring")


def test_ultralytics_reads_the_set_from_any_working_folder(
    card: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read = check_det_dataset(str(card), autodownload=False)
    assert tuple(read["names"].values()) == shapes.CLASSES
    for split in COUNTS:
        assert Path(read[split]) == (card.parent / "images" / split).resolve()


def test_an_interrupted_drawing_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, drawn = shapes._draw_image, []

    def interrupted(rng: np.random.Generator, name: str) -> tuple[bytes, str]:
        if len(drawn) == 5:
            raise KeyboardInterrupt
        drawn.append(rng)
        return real(rng, name)

    monkeypatch.setattr(shapes, "_draw_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        shapes.ensure(root=tmp_path, counts=COUNTS)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(contents(shapes.ensure(root=tmp_path, counts=COUNTS).parent)) == 1 + 2 * sum(COUNTS.values())


def test_a_killed_drawing_is_drawn_again(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from yolokd.data import shapes\n"
        "shapes._publish = lambda drawn, home: os._exit(9)\n"
        "shapes.ensure(root=Path(sys.argv[1]), counts={'train': 2})"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=quiet()).returncode == 9
    assert [path for path in tmp_path.iterdir() if not path.name.startswith(".")] == []
    assert shapes.ensure(root=tmp_path, counts={"train": 2}).exists()


def test_two_processes_at_once_draw_the_same_set(card: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from yolokd.data import shapes\n"
        f"print(shapes.ensure(root=Path(sys.argv[1]), counts={COUNTS}))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=quiet()) for _ in range(2)]
    answers = [process.communicate()[0].strip() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1]
    assert contents(Path(answers[0]).parent) == contents(card.parent)
    assert [path.name for path in tmp_path.iterdir()] == [card.parent.name]


def test_a_set_that_another_process_published_first_is_kept(tmp_path: Path) -> None:
    home = shapes.ensure(root=tmp_path, counts={"train": 1}).parent
    (home / "mark").touch()
    shapes._publish(shapes._generate(tmp_path / "late", 0, {"train": 1}), home)
    assert (home / "mark").exists()


def test_a_folder_that_is_no_complete_set_is_an_error(tmp_path: Path) -> None:
    home = shapes.ensure(root=tmp_path, counts={"train": 1}).parent
    (home / "data.yaml").unlink()
    with pytest.raises(OSError, match=home.name):
        shapes.ensure(root=tmp_path, counts={"train": 1})


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match="seed=-1: must not be negative"):
        shapes.ensure(seed=-1)


def quiet() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(shapes.__file__).parents[1])}
