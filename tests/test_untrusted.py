"""Files that are broken, or meant to harm: clear errors, and no code of theirs runs."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_detector, save_checkpoint

from yolokd import UserError
from yolokd.models.checkpoint import load_model
from yolokd.training.sidecar import load_sidecar, save_sidecar, sidecar_path

DAMAGES = 100  # of each kind


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_detector(), tmp_path_factory.mktemp("c") / "model.pt")


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    last = tmp_path_factory.mktemp("s") / "last.pt"
    save_sidecar(last, 3, {"epoch": 3, "model": {"w": torch.rand(50, 50)}, "random": {"python": (3, (1, 2), None)}})
    return last


def damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "truncated":
        return content[: rng.randrange(len(content))]
    # half of the flips in the last part, where a zip file keeps its table of contents, or in the first, the pickle
    where = rng.choice([range(len(content)), range(4000), range(len(content) - 20000, len(content))])
    flipped = bytearray(content)
    flipped[rng.choice(where)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def loads_or_says_why(load: Any) -> bool:
    """Whether it loads; a UserError of one line is the only other outcome."""
    try:
        load()
    except UserError as e:
        assert "\n" not in str(e)
        return False
    return True


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
@pytest.mark.parametrize("argument", ["teacher", "student", "resume"])
def test_a_damaged_checkpoint_is_a_clear_error(kind: str, argument: str, checkpoint: Path, tmp_path: Path) -> None:
    rng, content, path = random.Random(argument + kind), checkpoint.read_bytes(), tmp_path / "damaged.pt"
    outcomes = []
    for _ in range(DAMAGES):
        path.write_bytes(damaged(content, kind, rng))
        outcomes.append(loads_or_says_why(lambda: load_model(path, argument)))
    assert outcomes.count(False) >= (DAMAGES if kind == "truncated" else 5)


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_a_damaged_sidecar_is_a_clear_error(kind: str, sidecar: Path, tmp_path: Path) -> None:
    rng, content, last = random.Random(kind), sidecar_path(sidecar, 3).read_bytes(), tmp_path / "last.pt"
    outcomes = []
    for _ in range(DAMAGES):
        sidecar_path(last, 3).write_bytes(damaged(content, kind, rng))
        outcomes.append(loads_or_says_why(lambda: load_sidecar(last, 3)))
    assert outcomes.count(False) >= (DAMAGES if kind == "truncated" else 5)


def test_a_sidecar_of_another_format_names_the_version_that_reads_it(tmp_path: Path) -> None:
    save_sidecar(tmp_path / "last.pt", 0, {"format": 0, "yolokd": "0.0.9"})
    with pytest.raises(UserError, match=r"has the format of yolokd 0\.0\.9"):
        load_sidecar(tmp_path / "last.pt", 0)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize("name", ["plain pickle", "in a checkpoint", "in a sidecar"])
def test_no_code_of_a_file_runs(name: str, checkpoint: Path, tmp_path: Path) -> None:
    crater, last = tmp_path / "crater", tmp_path / "last.pt"
    if name == "in a sidecar":
        torch.save({"epoch": 0, "extra": Bomb(crater)}, sidecar_path(last, 0))
    elif name == "plain pickle":
        last.write_bytes(pickle.dumps(Bomb(crater)))
    else:
        torch.save(torch.load(checkpoint, weights_only=False) | {"extra": Bomb(crater)}, last)
    with pytest.raises(UserError):
        load_sidecar(last, 0) if name == "in a sidecar" else load_model(last, "teacher")
    assert not crater.exists()
