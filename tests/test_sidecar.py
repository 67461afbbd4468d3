"""Sidecars: a training resumes from those that earlier versions wrote, and broken ones are named."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cli import run_forked
from helpers.results import small_sidecar
from helpers.runs import TINY, train_one_epoch

from yolokd import UserError
from yolokd.training.resume.sidecar import drop_sidecars, load_sidecar, save_sidecar, sidecars
from yolokd.training.resume.state import check_state
from yolokd.training.trainer import DistillationTrainer

# As yolokd 0.1.0 wrote them. The names of the criterion are those of attributes and buffers. If you rename one, raise
# the format in yolokd/training/resume/sidecar.py, read older sidecars, too, and test that with one of them.
FORMAT = 1
KEYS = {
    "format", "yolokd", "epoch", "device", "names", "own", "model", "gradients", "pending", "ema", "optimizer",
    "scaler", "stopper", "stop", "best_fitness", "fitness", "metrics", "csv", "streams", "teachers", "precisions",
    "criterion", "measured",
    "content", "threads",  # added later; a resume works without them
}  # fmt: skip
STREAMS = {"random", "sampler", "buffer", "images", "drawn"}  # the last added later, too
RANDOM = {"python", "numpy", "torch", "cuda"}
CRITERION = {
    "stages.0.share",
    "stages.0.balance.task", "stages.0.balance.pull", "stages.0.balance.seen",
    "stages.0.methods.0.0.adapt.weight", "stages.0.methods.0.0.adapt.bias",
    "stages.0.methods.0.0.transform.0.weight", "stages.0.methods.0.0.transform.0.bias",
    "stages.0.methods.0.0.transform.2.weight", "stages.0.methods.0.0.transform.2.bias",
    "stages.0.methods.0.1.adapt.weight", "stages.0.methods.0.1.adapt.bias",
    "stages.0.methods.0.1.transform.0.weight", "stages.0.methods.0.1.transform.0.bias",
    "stages.0.methods.0.1.transform.2.weight", "stages.0.methods.0.1.transform.2.bias",
    "stages.0.methods.0.2.adapt.weight", "stages.0.methods.0.2.adapt.bias",
    "stages.0.methods.0.2.transform.0.weight", "stages.0.methods.0.2.transform.0.bias",
    "stages.0.methods.0.2.transform.2.weight", "stages.0.methods.0.2.transform.2.bias",
    "stages.0.methods.1.0.adapt.weight", "stages.0.methods.1.0.adapt.bias",
    "stages.0.methods.1.1.adapt.weight", "stages.0.methods.1.1.adapt.bias",
    "stages.0.methods.1.2.adapt.weight", "stages.0.methods.1.2.adapt.bias",
}  # fmt: skip
YOLOKD_KEYS = {
    "teacher", "stages", "method", "balance", "level_weights", "level_floor", "adapter", "check_teacher",
    "report", "teacher_precision", "teacher_imgsz", "teacher_compile", "teacher_channels", "probe", "unlabelled",
    "unlabelled_ratio", "classes_map", "trust", "force", "dfd.schedule", "dfd.warmup", "dfd.end", "dfd.alpha",
    "dfd.beta", "dfd.regions", "dfd.constraint", "dfd.width", "dfd.hidden", "pdf.schedule", "pdf.warmup", "pdf.end",
    "pdf.distance", "pdf.weighting", "pdf.scope", "pdf.box", "teachers", "levels",
}  # fmt: skip
MEASURED = {
    f"{level}/{value}"
    for level in ("P3", "P4", "P5")
    for value in ("share", "task_grad", "dfd_grad", "pdf_grad", "dfd_ratio", "pdf_ratio", "dfd_gain", "pdf_gain")
}


@pytest.fixture(scope="module")
def run(data: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was stopped after its first of two epochs."""
    settings = {**TINY, "data": data, "epochs": 2, "check_teacher": False}
    folder = tmp_path_factory.mktemp("run") / "run"
    return train_one_epoch(settings | {"save_dir": str(folder)}, teacher, method="dfd+pdf")


@pytest.fixture(scope="module")
def state(run: Path) -> dict[str, Any]:
    """Return the content of the run's sidecar; tests change copies of it."""
    (file,) = sidecars(run / "weights" / "last.pt")
    content: dict[str, Any] = torch.load(file, weights_only=True)
    return content


def test_a_sidecar_holds_the_names_that_earlier_versions_wrote(state: dict[str, Any]) -> None:
    assert state["format"] == FORMAT
    assert state.keys() == KEYS
    assert state["criterion"].keys() == CRITERION
    assert state["own"].keys() == YOLOKD_KEYS
    assert state["measured"].keys() == MEASURED
    assert state["ema"].keys() == {"state", "updates"}
    assert state["stopper"].keys() == {"best_fitness", "best_epoch", "patience", "possible_stop"}
    assert [streams.keys() for streams in state["streams"]] == [STREAMS]
    assert state["streams"][0]["random"].keys() == RANDOM


@pytest.fixture(scope="module")
def small(run: Path) -> dict[str, Any]:
    return small_sidecar(run)


@pytest.mark.parametrize("key", sorted(KEYS - {"format", "yolokd", "content", "threads"}))
def test_a_sidecar_that_lacks_a_part_is_refused(key: str, small: dict[str, Any], tmp_path: Path) -> None:
    save_sidecar(tmp_path / "last.pt", 0, {k: v for k, v in small.items() if k != key})
    with pytest.raises(UserError, match=f"resume=.*its sidecar distill-last-0.pt is broken: .*{key}.*remove distill"):
        load_sidecar(tmp_path / "last.pt", 0)


WRONG: dict[str, Any] = {
    "epoch": "0", "device": 3, "names": ["disc", "box"], "own": [], "model": {"weight": 1.0}, "pending": -1,
    "gradients": [], "ema": {"state": {}, "updates": "3"}, "optimizer": {"param_groups": [{"params": [0]}]},
    "scaler": {"scale": 1.0}, "stopper": {"best_epoch": 1}, "stop": "no", "best_fitness": "high", "fitness": [],
    "metrics": {"precision": "high"}, "csv": 3, "teachers": [1], "precisions": "fp32", "criterion": [],
    "measured": {"P3/share": "much"}, "content": 1, "threads": "2",
    "streams": [{"random": {}, "sampler": None, "buffer": [], "images": ""}],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_a_sidecar_with_a_part_of_a_wrong_type_is_refused(key: str, small: dict[str, Any], tmp_path: Path) -> None:
    save_sidecar(tmp_path / "last.pt", 0, small | {key: WRONG[key]})
    with pytest.raises(UserError, match=rf"is broken: its {key}.*: "):
        load_sidecar(tmp_path / "last.pt", 0)


def test_random_states_that_cannot_be_set_are_refused(small: dict[str, Any], tmp_path: Path) -> None:
    (streams,) = small["streams"]
    for change in (
        {"sampler": torch.zeros(3)},
        {"random": streams["random"] | {"python": (3, (1, 2), None)}},
        {"random": streams["random"] | {"numpy": ("MT19937", torch.zeros(3), 0, 0, 0.0)}},
        {"random": streams["random"] | {"torch": torch.zeros(3)}},
    ):
        save_sidecar(tmp_path / "last.pt", 0, small | {"streams": [streams | change]})
        with pytest.raises(UserError, match=rf"is broken: its streams.0.{next(iter(change))}.*: is not "):
            load_sidecar(tmp_path / "last.pt", 0)


def test_sidecars_of_earlier_versions_and_of_a_gradient_scaler_are_read(small: dict[str, Any], tmp_path: Path) -> None:
    earlier = {k: v for k, v in small.items() if k not in {"content", "threads"}}
    for state in (earlier, small | {"scaler": torch.amp.GradScaler("cpu").state_dict()}):
        save_sidecar(tmp_path / "last.pt", 0, state)
        assert load_sidecar(tmp_path / "last.pt", 0) is not None


def reshape(*keys: Any) -> Callable[[Any], None]:
    """Return a function that replaces a tensor of a state by one that is longer by one in its last dimension."""

    def change(state: Any) -> None:
        *parents, last = keys
        for key in parents:
            state = state[key]
        state[last] = torch.zeros(*state[last].shape[:-1], state[last].shape[-1] + 1)

    return change


UNFIT: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a weight": (reshape("model", "model.0.conv.weight"), "its model.model.0.conv.weight has the shape ["),
    "no weight": (lambda s: s["model"].pop("model.0.bn.running_var"), "its model.model.0.bn.running_var is missing"),
    "too much": (lambda s: s["model"].update(x=torch.ones(1)), "its model.x has no place in this run"),
    "an average": (reshape("ema", "state", "model.0.bn.bias"), "its ema.state.model.0.bn.bias has the shape ["),
    "a gradient": (
        lambda s: s["gradients"].update({"model.0.bn.bias": torch.ones(3)}),
        "its gradients.model.0.bn.bias has the shape [3] instead of [",
    ),
    "a moment": (reshape("optimizer", "state", 0, "exp_avg"), "its optimizer.state.0.exp_avg has the"),
    "other moments": (lambda s: s["optimizer"]["state"][0].pop("exp_avg"), "holds other values than its group"),
    "a group": (lambda s: s["optimizer"]["param_groups"][0]["params"].pop(), "its optimizer.param_groups hold"),
    "a buffer": (lambda s: s["criterion"].pop("stages.0.share"), "its criterion.stages.0.share is missing"),
    "an adapter": (reshape("criterion", "stages.0.methods.0.0.adapt.bias"), "adapt.bias has the shape"),
    "an image": (lambda s: s["streams"][0].update(buffer=[0, 99]), "its streams.buffer: there is no image 99"),
}  # fmt: skip


def test_a_sidecar_whose_tensors_do_not_fit_the_run_is_refused(
    run: Path, state: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    last = tmp_path / "run" / "weights" / "last.pt"
    trainer = DistillationTrainer(overrides={"resume": str(last), "model": str(last)})
    trainer._setup_train()
    check_state(trainer, state)
    for change, problem in UNFIT.values():
        changed = deepcopy(state)
        change(changed)
        with pytest.raises(ValueError, match=re.escape(problem)):
            check_state(trainer, changed)


def test_a_resume_with_a_broken_sidecar_is_one_line_and_changes_nothing(
    run: Path, state: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    changed = deepcopy(state)
    del changed["criterion"]["stages.0.balance.seen"]
    save_sidecar(tmp_path / "run" / "weights" / "last.pt", 0, changed)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in {".pt", ".csv"}}
    done = run_forked("train", "resume=run", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("yolokd: "))
    assert "its sidecar distill-last-0.pt is broken: its criterion.stages.0.balance.seen is missing (remove" in line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in {".pt", ".csv"}}


def test_other_files_beside_a_checkpoint_are_no_sidecars(small: dict[str, Any], tmp_path: Path) -> None:
    last = tmp_path / "last[1].pt"
    others = ["distill-last[1]-foo.pt", "distill-last[1]-.pt", "distill-last[1]--1.pt", "distill-best-0.pt"]
    for name in others:
        (tmp_path / name).write_text("mine")
    save_sidecar(last, 10, small)
    save_sidecar(last, 9, small)
    assert [path.name for path in sidecars(last)] == ["distill-last[1]-9.pt", "distill-last[1]-10.pt"]
    drop_sidecars(last)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
