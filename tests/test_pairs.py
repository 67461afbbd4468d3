"""Every family of detectors that Ultralytics builds, as teacher and as student."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from helpers.data import write_dataset
from helpers.families import CONFIGS, FAMILIES, random_model, tiny_config
from helpers.models import save_checkpoint
from helpers.pairs import METHOD_KINDS, try_pair
from helpers.pairs_table import markdown, read_pairs, write_pairs

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "runs/reference/pairs/pairs.csv"
FEW = [
    ("v9", "11"),
    ("v10", "v3"),
    ("26", "v8-p2"),
    ("RT-DETR", "12"),
    ("v6", "26"),
    ("v3-tiny", "v5-p6"),
    ("v8", "RT-DETR"),
]
# Built as one of the families is: other sizes, blocks and backbones. YOLO-World and YOLOE have tests of their own.
LIKE_ANOTHER = ("yolov3-spp", "yolov8-ghost", "yolov8-ghost-p2", "yolov8-ghost-p6")
OTHER_SIZES = ("yolov9", "yolov10", "rtdetr-")
OTHER_TASKS = ("-cls", "-seg", "-pose", "-obb", "-depth", "-sem", "yoloe", "world")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a data set, to which models are added as they are needed."""
    folder = tmp_path_factory.mktemp("families")
    write_dataset(folder / "data", train=4, val=2)
    return folder


def outcome(teacher: str, student: str, folder: Path) -> dict[str, str]:
    """Return what came of a pair: {kind of method: why it is refused}."""
    checkpoint = folder / f"{teacher}.pt"
    if not checkpoint.exists():
        save_checkpoint(random_model(tiny_config(teacher, folder)), checkpoint)
    return try_pair(checkpoint, tiny_config(student, folder), str(folder / "data" / "data.yaml"))


@pytest.mark.parametrize(("teacher", "student"), FEW)
def test_a_pair_trains_or_is_refused_as_the_table_says(teacher: str, student: str, folder: Path) -> None:
    assert outcome(teacher, student, folder) == read_pairs(TABLE)[teacher, student]


@pytest.mark.slow
def test_all_pairs_train_or_are_refused_as_the_table_says(folder: Path) -> None:
    pairs = {pair: outcome(*pair, folder) for pair in product(FAMILIES, FAMILIES)}
    write_pairs(folder / TABLE.name, pairs)
    assert (folder / TABLE.name).read_text() == TABLE.read_text(), f"to update it: cp {folder / TABLE.name} {TABLE}"


def test_the_table_holds_every_pair_and_the_readme_shows_it() -> None:
    pairs = read_pairs(TABLE)
    assert set(pairs) == set(product(FAMILIES, FAMILIES))
    assert all(kind in METHOD_KINDS for refused in pairs.values() for kind in refused)
    assert markdown(pairs) in (ROOT / "cfg/README.md").read_text(encoding="utf-8")


def test_every_detector_that_ultralytics_can_build_belongs_to_a_family_of_the_table() -> None:
    listed = {Path(source).stem for source, _ in FAMILIES.values()}
    for path in CONFIGS.glob("*/*.yaml"):
        known = path.stem in listed or path.stem in LIKE_ANOTHER or path.stem.startswith(OTHER_SIZES)
        assert known or any(task in path.stem for task in OTHER_TASKS), path.name
