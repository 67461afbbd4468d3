"""Runs that are killed and resumed end as those that never were; what cannot be resumed is refused."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, logged, random_detector, save_checkpoint, states_equal, write_dataset
from results import cut, rows
from ultralytics import YOLO

from yolokd import UserError, YoloDistiller
from yolokd.distiller import _resumed
from yolokd.runtime.files import AtomicPath, atomic_path
from yolokd.runtime.rng import random_state, set_random_state
from yolokd.runtime.signals import Interrupted, handle_signals
from yolokd.training.sidecar import sidecars
from yolokd.training.state import capture, restore

EPOCHS = 5
KILLED = Path(__file__).with_name("killed.py")


def settings(data: str, teacher: str, student: str, folder: Path) -> dict[str, Any]:
    """Batches whose gradients wait from one epoch to the next, mosaic that closes, gains that balance."""
    method = {"method": "dfd+mgd", "balance": 0.3} if student == "yolov8n.yaml" else {"method": "pdf"}
    own = {"teacher": teacher, "teacher_precision": "fp32", "check_teacher": False, "probe": 2}
    length = {"epochs": EPOCHS, "close_mosaic": 2, "nbs": 8, "warmup_epochs": 1.0, "deterministic": True}
    return {**TINY, **own, **method, **length, "data": data, "student": student, "save_dir": str(folder)}


def outcome(folder: Path) -> tuple[list[dict[str, str]], list[dict[str, torch.Tensor]]]:
    with open(folder / "results.csv") as f:
        rows = [{k: v for k, v in row.items() if k.strip() != "time"} for row in csv.DictReader(f)]
    files = [folder / "weights" / name for name in ("last.pt", "best.pt")]
    return rows, [torch.load(f, weights_only=False)["model"].state_dict() for f in files]


@pytest.fixture(scope="module")
def whole(data: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A student's run that was never cut off, in a process of its own."""

    @cache
    def folder_of(student: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / "run"
        assert kill(settings(data, teacher, student, folder), "never", 1).returncode == 0
        return folder

    return folder_of


def kill(keys: dict[str, Any], operation: str, number: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(KILLED), operation, str(number), json.dumps(keys)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def check_kill(keys: dict[str, Any], at: tuple[str, int], whole: Path) -> None:
    folder = Path(keys["save_dir"])
    killed = kill(keys, *at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    weights = folder / "weights"
    if (weights / "last.pt").exists():  # then it is whole, and its sidecar with it
        epoch = torch.load(weights / "last.pt", weights_only=False)["epoch"]
        found = sidecars(weights / "last.pt")
        assert epoch < 0 or any(torch.load(s, weights_only=True)["epoch"] == epoch for s in found)
    assert kill({"resume": str(folder)}, "never", 1).returncode == 0
    rows, states = outcome(folder)
    expected_rows, expected_states = outcome(whole)
    assert rows == expected_rows
    assert all(states_equal(a, b) for a, b in zip(states, expected_states, strict=True))
    assert not sidecars(weights / "last.pt")
    assert not list(weights.glob(".*.tmp"))


# Each epoch syncs and renames a sidecar, last.pt and, if it is the best, best.pt; folders are synced as well.
FAST = [("batch", 8), ("renamed", 5)]
SLOW = [
    ("val", EPOCHS + 1),  # one batch of validation an epoch, then the final one
    *(("written", n) for n in (5, 8, 9)), *(("synced", n) for n in (6, 9)), *(("renaming", n) for n in (4, 5, 6)),
    *(("renamed", n) for n in (4, 6)), ("row", 3), ("row written", 3), ("dropping", 6), ("epoch", 4),
    ("stripping", 1), ("stripped", 1), ("stripping", 2), ("stripped", 2),
]  # fmt: skip
RANDOM = [("batch", n) for n in random.Random(0).sample(range(4, 3 * EPOCHS), 4)]


@pytest.mark.parametrize("at", FAST, ids=str)
def test_a_killed_run_ends_as_one_that_was_not(
    at: tuple[str, int], whole: Callable[[str], Path], data: str, teacher: str, tmp_path: Path
) -> None:
    check_kill(settings(data, teacher, "yolov8n.yaml", tmp_path / "run"), at, whole("yolov8n.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("student", ["yolov8n.yaml", "yolo26n.yaml"])
@pytest.mark.parametrize("at", [*SLOW, *RANDOM], ids=str)
def test_a_run_killed_anywhere_ends_as_one_that_was_not(
    at: tuple[str, int], student: str, whole: Callable[[str], Path], data: str, teacher: str, tmp_path: Path
) -> None:
    check_kill(settings(data, teacher, student, tmp_path / "run"), at, whole(student))


def test_a_run_killed_in_its_first_epoch_has_nothing_to_resume(data: str, teacher: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert kill(settings(data, teacher, "yolov8n.yaml", folder), "batch", 2).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="no checkpoint there"):
        YoloDistiller().train(resume=str(folder))


def cut_off(tiny: dict[str, Any], teacher: str | None, method: str = "fitnet") -> Path:
    d = YoloDistiller(teacher=teacher, student="yolov8n.yaml", method=method)
    cut(d, {"teacher_precision": "fp32"} | tiny)
    return Path(d.trainer.save_dir)


def test_another_teacher_is_refused_unless_forced(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    folder = cut_off(tiny, teacher)
    other = str(save_checkpoint(random_detector("yolov8s.yaml", seed=9), tmp_path / "other.pt"))
    with pytest.raises(UserError, match="teacher: is another than the run began with"):
        YoloDistiller().train(resume=str(folder), teacher=other)
    YoloDistiller().train(resume=str(folder), teacher=other, force=True)


def test_another_method_goes_on_where_forced(tiny: dict[str, Any], teacher: str) -> None:
    folder = cut_off(tiny, teacher)
    falling = {"method": "dfd", "balance": "off", "dfd.gain": 1.0, "dfd.schedule": "linear"}
    with logged() as lines:
        d = YoloDistiller()
        d.train(resume=str(folder), force=True, **falling)
    (row,) = rows(d.trainer)
    assert 0 < row["train/dfd_gain"] <= 1 / d.trainer.epochs  # the schedule goes on as well
    assert "fitnet_gain" in (folder / "results-to-1.csv").read_text()
    assert d.trainer.plan.config.method == "dfd"
    assert d.trainer.start_epoch == 1
    assert any("start anew" in line for line in lines)


def test_other_classes_are_refused(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    folder = cut_off(tiny, teacher)
    other = write_dataset(tmp_path / "other", names={0: "disc", 1: "crate"})
    with pytest.raises(UserError, match="data: has other classes"):
        YoloDistiller().train(resume=str(folder), data=str(other))


def test_a_teacher_for_a_run_without_one_is_refused(tiny: dict[str, Any], teacher: str) -> None:
    folder = cut_off(tiny, None, method="none")
    with pytest.raises(UserError, match="teacher: would not teach"):
        YoloDistiller(teacher=teacher).train(resume=str(folder))


@pytest.mark.parametrize("method", [None, "fitnet"])
def test_a_checkpoint_of_plain_ultralytics_goes_on(method: str | None, tiny: dict[str, Any], teacher: str) -> None:
    model = YOLO("yolov8n.yaml")
    cut(model, {k: v for k, v in tiny.items() if k != "check_teacher"} | {"name": "plain"})
    with logged() as lines:
        d = YoloDistiller(teacher=teacher, method=method)
        d.train(resume=str(model.trainer.last))
    assert d.trainer.start_epoch == 1
    assert d.trainer.criterion is not None
    assert any("no exact continuation" in line for line in lines)
    assert [row["epoch"] for row in rows(d.trainer)] == [2]


def test_what_a_resume_may_change_is_changed(tiny: dict[str, Any], teacher: str) -> None:
    """Another batch, after the warm-up, gathers as many images a step; patience and freeze are the new ones."""
    folder = cut_off(tiny | {"nbs": 16, "warmup_epochs": 0, "epochs": 3}, teacher)
    seen: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        seen["accumulate"] = int(trainer.accumulate)
        frozen = [p for name, p in trainer.model.named_parameters() if name.startswith("model.0.")]
        seen["frozen"] = [p.grad is None and not p.requires_grad for p in frozen]

    d = YoloDistiller()
    d.add_callback("on_train_batch_start", look)
    d.train(resume=str(folder), batch=2, patience=0, freeze=1)
    assert seen == {"accumulate": 8, "frozen": [True] * 3}
    assert d.trainer.stopper.patience == float("inf")  # as Ultralytics takes 0


def test_a_run_begun_without_a_scaler_goes_on_with_one(tiny: dict[str, Any]) -> None:
    """On a CPU it is off, on a GPU it would be on."""
    d = YoloDistiller(method="none")
    cut(d, tiny)
    state = capture(d.trainer)
    d.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    restore(d.trainer, state)
    assert d.trainer.scaler.get_scale() == 8.0


def test_random_streams_come_back() -> None:
    state = random_state()
    draws = [(random.random(), np.random.rand(), float(torch.rand(1))) for _ in range(2)]
    set_random_state(state)
    assert [(random.random(), np.random.rand(), float(torch.rand(1))) for _ in range(2)] == draws


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    """As far as one process can fill it: a limit on the size of its files."""
    path = AtomicPath(tmp_path / "last.pt")
    path.write_bytes(b"good")
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
        try:
            path.write_bytes(bytes(2**20))
        except UserError as e:
            os._exit(0 if "cannot be written" in str(e) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_bytes() == b"good"
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_failed_block_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("good")
    with contextlib.suppress(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_at_the_end_of_a_step(number: int, status: int, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    words = {**TINY, "data": data, "epochs": 1000, "method": "none", "save_dir": folder}
    command = [sys.executable, "-m", "yolokd.cli", "train", *(f"{k}={v}" for k, v in words.items())]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=listen, **pipes) as process:
        wait_for(lambda: epochs_of(folder) >= 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.splitlines()[-1] == f"yolokd: interrupted; go on with: yolokd train resume='{folder}'"
    last = torch.load(folder / "weights" / "last.pt", weights_only=False)
    assert last["epoch"] + 1 == epochs_of(folder)
    (sidecar,) = sidecars(folder / "weights" / "last.pt")
    assert torch.load(sidecar, weights_only=True)["epoch"] == last["epoch"]


@pytest.mark.usefixtures("_default_signals")
def test_a_signal_after_the_last_step_is_not_lost(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    d = YoloDistiller(method="none")
    d.add_callback("on_train_end", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="the training is finished"), logged() as lines:
        d.train(**{k: v for k, v in tiny.items() if k != "project"} | {"epochs": 1})
    assert d.trainer.best == tmp_path / "runs" / "distill" / "train" / "weights" / "best.pt"
    assert d.trainer.best.exists()
    assert d.trainer.args.project is None  # a name of the user's to loggers
    stripped = [line for line in lines if "Optimizer stripped" in line]
    assert len(stripped) == 2
    assert all(f"saved as {d.trainer.wdir}" in line and ".tmp" not in line for line in stripped)


@pytest.mark.usefixtures("_default_signals")
def test_a_data_worker_that_died_of_the_same_signal_is_no_failure(tiny: dict[str, Any]) -> None:
    """As torch tells of it, in a process group that was told to end."""

    def end(_trainer: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    d = YoloDistiller(method="none")
    d.add_callback("on_train_batch_start", end)
    with pytest.raises(Interrupted, match="no finished epoch") as interrupted:
        d.train(**tiny)
    assert interrupted.value.signum == signal.SIGTERM


@pytest.mark.usefixtures("_default_signals")
def test_the_run_that_lay_there_is_not_what_goes_on(tiny: dict[str, Any]) -> None:
    folder = cut_off(tiny, None, method="none")
    time.sleep(1.1)  # of a file system that tells whole seconds
    d = YoloDistiller(method="none")
    d.add_callback("on_train_batch_start", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="no finished epoch"):
        d.train(**tiny | {"save_dir": str(folder)})


def test_a_named_checkpoint_is_what_resume_true_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ultralytics documents it so; the latest run is another."""
    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "runs" / "distill" / name / "weights" / "last.pt" for name in ("train", "train-2")]
    for last in runs:
        last.parent.mkdir(parents=True)
        last.touch()
        time.sleep(0.02)
    named = runs[0].relative_to(tmp_path)
    assert _resumed({"resume": True})["resume"] == str(runs[1])
    assert _resumed({"resume": True, "model": str(named)})["resume"] == str(runs[0])
    assert _resumed({"resume": True, "student": str(named)})["resume"] == str(runs[0])
    assert _resumed({"resume": True, "student": "yolov8n.pt"})["resume"] == str(runs[1])


def listen() -> None:
    """Tests that run in the background begin with Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def epochs_of(folder: Path) -> int:
    results = folder / "results.csv"
    return len(results.read_text().splitlines()) - 1 if results.exists() else 0


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def _default_signals() -> Iterator[None]:
    before = {number: signal.signal(number, signal.default_int_handler) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_default_signals")
def test_a_second_signal_stops_at_once() -> None:
    with handle_signals() as request:
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.signum == signal.SIGTERM
        with pytest.raises(Interrupted, match="at once") as interrupted:
            os.kill(os.getpid(), signal.SIGINT)
    assert interrupted.value.signum == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("_default_signals")
def test_an_ignored_signal_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with handle_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
    assert request.signum is None
