"""Wrong settings are named in one line before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.cli import run_forked
from helpers.data import write_dataset
from helpers.models import YOLOV8N

from yolokd import UserError, YoloDistiller
from yolokd.config.arguments import parse_value
from yolokd.config.train_settings import TYPES, check_types
from yolokd.training.plan import check_data, make_plan


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 5),
        ("name", "a\0b"),
        ("name", "n" * 300),
        ("project", "p/" * 3000),
        ("save_dir", 5),
        ("pretrained", "x.yaml"),
        ("pretrained", "missing/weights.pt"),
        ("pretrained", 3),
        ("distill_model", "missing/teacher.pt"),
        ("data", ["a.yaml"]),
        ("augmentations", 5),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 1.5),
        ("time", float("nan")),
        ("time", -1),
        ("imgsz", 10**6),
        ("imgsz", "big"),
        ("imgsz", [[[[64]]]]),
        ("imgsz", parse_value("[" * 50 + "64" + "]" * 50)),
        ("imgsz", parse_value("[" * 100_000)),
        ("lr0", float("inf")),
        ("epochs", True),
        ("epochs", 0),
        ("optimizer", "sdg"),
        ("batch", float("nan")),
        ("workers", -3),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_written(
    key: str, value: object, tiny: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        YoloDistiller(method="none").train(**tiny | {key: value})
    assert key in str(error.value)
    assert len(str(error.value)) < 800
    assert not (tmp_path / "runs").exists()


def test_a_teachers_image_size_that_no_memory_holds_is_refused(
    tiny: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"teacher_imgsz=1000000: takes more than"):
        YoloDistiller(teacher=teacher).train(**tiny | {"teacher_imgsz": 10**6})
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("batch", "images"), [(1, 12), (4, 13)])
def test_a_batch_of_one_position_is_refused(batch: int, images: int, tiny: dict[str, Any], tmp_path: Path) -> None:
    """Torch's BatchNorm cannot train on one value for each channel."""
    data = write_dataset(tmp_path / "data", train=images, val=2)
    with pytest.raises(UserError, match=rf"imgsz=32 batch={batch}: leaves one position"):
        YoloDistiller(method="none").train(**tiny | {"imgsz": 32, "batch": batch, "data": str(data)})
    assert not (tmp_path / "runs").exists()


def test_a_batch_of_one_position_at_the_smallest_size_is_refused(tiny: dict[str, Any], tmp_path: Path) -> None:
    data = str(write_dataset(tmp_path / "d", train=13))
    plan = make_plan({**tiny, "model": YOLOV8N, "method": "none", "data": data, "imgsz": 96, "multi_scale": 0.5})
    with pytest.raises(UserError, match=r"imgsz=96 batch=4 multi_scale=0[.]5: leaves one position"):
        check_data(plan)


def test_all_defaults_of_ultralytics_pass_the_schema() -> None:
    from ultralytics.utils import DEFAULT_CFG_DICT

    check_types(DEFAULT_CFG_DICT)
    assert len(TYPES.keys() & DEFAULT_CFG_DICT.keys()) > 80


def test_a_long_or_binary_value_gives_one_line_on_the_command_line(tmp_path: Path) -> None:
    result = run_forked("train", "method=none", f"name={'n' * 3000}", "seed=-1", cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("runs"))


IN_THE_WAY: dict[str, Callable[[Path, Path], Any]] = {
    "folder": lambda place, _: place.mkdir(),
    "file": lambda place, _: place.write_text("mine"),
    "link": lambda place, elsewhere: place.symlink_to(elsewhere),
    "pipe": lambda place, _: os.mkfifo(place),
}
RUN_FILES = [
    "args.yaml", "distill.yaml", "results.csv", "weights/last.pt", "weights/best.pt", "weights/distill-last-0.pt",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *(("folder", name) for name in RUN_FILES),
        *(("link", name) for name in (*RUN_FILES, "weights", ".train.lock")),
        ("pipe", "results.csv"),
        ("file", "weights"),
        ("file", ""),
    ],
)
def test_what_is_in_the_place_of_a_runs_file_is_named_and_kept(
    kind: str, name: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    elsewhere, place = tmp_path / "elsewhere", tmp_path / "run" / name
    elsewhere.mkdir() if name == "weights" else elsewhere.write_text("theirs")
    place.parent.mkdir(parents=True, exist_ok=True)
    IN_THE_WAY[kind](place, elsewhere)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(UserError) as error:
        YoloDistiller(method="none").train(**tiny | {"save_dir": str(tmp_path / "run")})
    assert str(tmp_path / "run") in str(error.value)
    assert name in str(error.value)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
