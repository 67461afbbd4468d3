"""Broken and harmful files give clear errors, and none of their code runs."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.models import random_detector, save_checkpoint

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
    # Anywhere, or at the start, where the pickle is, or at the end, where a zip file has its table of contents.
    where = rng.choice([range(len(content)), range(4000), range(len(content) - 20000, len(content))])
    flipped = bytearray(content)
    flipped[rng.choice(where)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def loads_or_raises_user_error(load: Any) -> bool:
    """Return whether a file loads. Fails on anything but success or a UserError of one line."""
    try:
        load()
    except UserError as e:
        assert "\n" not in str(e)
        return False
    return True


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
@pytest.mark.parametrize("argument", ["teacher", "student", "resume"])
def test_a_damaged_checkpoint_gives_one_line_of_error(
    kind: str, argument: str, checkpoint: Path, tmp_path: Path
) -> None:
    rng, content, path = random.Random(argument + kind), checkpoint.read_bytes(), tmp_path / "damaged.pt"
    outcomes = []
    for _ in range(DAMAGES):
        path.write_bytes(damaged(content, kind, rng))
        outcomes.append(loads_or_raises_user_error(lambda: load_model(path, argument)))
    assert outcomes.count(False) >= (DAMAGES if kind == "truncated" else 5)


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_a_damaged_sidecar_gives_one_line_of_error(kind: str, sidecar: Path, tmp_path: Path) -> None:
    rng, content, last = random.Random(kind), sidecar_path(sidecar, 3).read_bytes(), tmp_path / "last.pt"
    outcomes = []
    for _ in range(DAMAGES):
        sidecar_path(last, 3).write_bytes(damaged(content, kind, rng))
        outcomes.append(loads_or_raises_user_error(lambda: load_sidecar(last, 3)))
    assert outcomes.count(False) >= (DAMAGES if kind == "truncated" else 5)


def test_the_error_for_a_sidecar_of_another_format_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    save_sidecar(tmp_path / "last.pt", 0, {"format": 0, "yolokd": "0.0.9"})
    with pytest.raises(UserError, match=r"has the format of yolokd 0\.0\.9"):
        load_sidecar(tmp_path / "last.pt", 0)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize("name", ["plain pickle", "in a checkpoint", "in a sidecar"])
def test_no_code_in_a_file_runs(name: str, checkpoint: Path, tmp_path: Path) -> None:
    target, last = tmp_path / "target", tmp_path / "last.pt"
    if name == "in a sidecar":
        torch.save({"epoch": 0, "extra": Payload(target)}, sidecar_path(last, 0))
    elif name == "plain pickle":
        last.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save(torch.load(checkpoint, weights_only=False) | {"extra": Payload(target)}, last)
    with pytest.raises(UserError):
        load_sidecar(last, 0) if name == "in a sidecar" else load_model(last, "teacher")
    assert not target.exists()
