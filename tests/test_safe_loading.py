"""Broken and harmful files give clear errors, and none of their code runs."""

from __future__ import annotations

import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from helpers.models import random_detector, save_checkpoint
from helpers.runs import TINY, captured_log, train_one_epoch
from ultralytics.cfg import get_cfg
from ultralytics.utils import ROOT, YAML

from yolokd import UserError, YoloDistiller
from yolokd.config.parse import merge_cfg_file
from yolokd.data.dataset import check_images, load_data
from yolokd.models.checkpoint import load_model, load_student
from yolokd.patches.label_cache import load_label_cache
from yolokd.training.resume import load_saved_run
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


def test_no_code_in_a_label_cache_runs_and_its_labels_are_scanned_anew(data: str, tmp_path: Path) -> None:
    target, copy = tmp_path / "target", tmp_path / "copy"
    shutil.copytree(Path(data).parent, copy)
    settings = get_cfg(overrides={"data": str(copy / "data.yaml"), "imgsz": 64})
    loaded = load_data(settings.data)
    check_images(loaded, settings)
    cache = next(copy.rglob("train.cache"))
    labels = load_label_cache(cache)["labels"]
    expected = np.load(cache, allow_pickle=True).item()["labels"]
    assert [label["im_file"] for label in labels] == [label["im_file"] for label in expected]
    assert all(np.array_equal(a["bboxes"], b["bboxes"]) for a, b in zip(labels, expected, strict=True))
    with open(cache, "wb") as f:
        np.save(f, np.array({"version": "1", "labels": Payload(target)}, dtype=object))
    check_images(loaded, settings)
    assert not target.exists()
    assert len(load_label_cache(cache)["labels"]) == len(labels)


@pytest.mark.parametrize(
    "hostile",
    [
        {"activation": "Path('{target}').write_text('boom')"},
        {"activation": "[nn.SiLU(), __import__('pathlib').Path('{target}').write_text('boom')][0]"},
        {"head": [[-1, 1, "torch_safe_load", ["{pickle}", False]]]},
    ],
)
def test_no_code_in_a_students_yaml_runs(hostile: dict[str, Any], tmp_path: Path) -> None:
    target, pickled = tmp_path / "target", tmp_path / "pickle.pt"
    torch.save({"model": Payload(target)}, pickled)
    text = yaml.safe_dump(YAML.load(ROOT / "cfg/models/v8/yolov8.yaml") | hostile)
    text = text.replace("{target}", str(target)).replace("{pickle}", str(pickled))
    (tmp_path / "yolov8n.yaml").write_text(text)
    with pytest.raises(UserError, match="does not describe a YOLO detector"):
        load_student(str(tmp_path / "yolov8n.yaml"), {"nc": 2, "channels": 3}, trust=False)
    assert not target.exists()


@pytest.fixture(scope="module")
def interrupted(data: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was stopped after its first of two epochs."""
    settings = {**TINY, "data": data, "epochs": 2, "check_teacher": False}
    return train_one_epoch({**settings, "save_dir": str(tmp_path_factory.mktemp("run") / "run")}, teacher)


def copied(run: Path, folder: Path) -> Path:
    """Copy a run's checkpoint and sidecar into another folder, as a stranger would send them; return the folder."""
    shutil.copytree(run / "weights", folder / "weights")
    return folder


def test_files_cannot_trust_themselves(interrupted: Path, tmp_path: Path) -> None:
    """Trust comes from the command line or from Python, not from a checkpoint, a sidecar or a cfg= file."""
    target = tmp_path / "target"
    last = copied(interrupted, tmp_path / "stranger") / "weights" / "last.pt"
    checkpoint = torch.load(last, weights_only=False)
    torch.save(checkpoint | {"train_args": checkpoint["train_args"] | {"trust": True}}, last)
    state = load_sidecar(last, 0)
    assert state is not None
    save_sidecar(last, 0, state | {"own": state["own"] | {"trust": True}})
    torch.save({"model": Payload(target)}, tmp_path / "stranger" / "teacher.pt")
    hostile = {"train": "missing", "val": "missing", "names": ["a"], "download": f"open('{target}', 'w')"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(hostile))
    with captured_log() as lines, pytest.raises(UserError, match="its download: is code"):
        YoloDistiller().train(resume=str(last), data=str(tmp_path / "data.yaml"))
    assert any("its trust=True is ignored" in line for line in lines)
    with pytest.raises(UserError, match="could run code"):
        YoloDistiller().train(resume=str(last), teacher=str(tmp_path / "stranger" / "teacher.pt"))
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump({"trust": True, "method": "none", "data": "data.yaml"}))
    with captured_log() as lines:
        assert "trust" not in merge_cfg_file({"cfg": tmp_path / "distill.yaml"})
    assert any("its trust=True is ignored" in line for line in lines)
    assert merge_cfg_file({"cfg": tmp_path / "distill.yaml", "trust": True})["trust"] is True
    assert not target.exists()


def test_a_copied_run_resumes_where_it_lies_and_leaves_the_original_alone(interrupted: Path, tmp_path: Path) -> None:
    original = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    folder = copied(interrupted, tmp_path / "copy")
    distiller = YoloDistiller()
    distiller.train(resume=str(folder))
    assert Path(distiller.trainer.save_dir) == folder
    assert len((folder / "results.csv").read_text().splitlines()) == 3
    assert original == {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    loose = tmp_path / "loose"
    shutil.copytree(interrupted / "weights", loose)
    assert load_saved_run({"resume": str(loose / "last.pt")}).folder == loose
