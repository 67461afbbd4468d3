"""A killed and resumed run ends as one that was not killed; runs that cannot be resumed are refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import shutil
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
from filelock import FileLock
from helpers.data import write_dataset
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, random_detector, save_checkpoint
from helpers.results import repeatable_rows, rows, saved_weights, states_equal
from helpers.runs import TINY, captured_log, train_and_stop, train_one_epoch
from ultralytics import YOLO

from yolokd import UserError, YoloDistiller
from yolokd.config.parse import split_keys
from yolokd.distiller import _resume_overrides
from yolokd.runtime.files import AtomicPath, atomic_path
from yolokd.runtime.lock import LOCK_FILE, VARIABLE, FolderLock, inherit_lock
from yolokd.runtime.rng import random_state, set_random_state
from yolokd.runtime.signals import Interrupted, handle_signals
from yolokd.training.resume.sidecar import is_trained, sidecars
from yolokd.training.resume.state import capture_state, restore_state

EPOCHS = 5
PROGRAM = Path(__file__).with_name("helpers") / "programs" / "killed_training.py"


def settings(data: str, teacher: str, student: str, folder: Path) -> dict[str, Any]:
    """Return settings with much state: gradients accumulated across epochs, mosaic that ends, balanced gains.

    One of the students also sees unlabelled images: passes over the six of them begin in the midst of epochs.
    The other one's method needs its own loss, and layers of its head.
    """
    unlabelled = {"unlabelled": str(Path(data).parent / "images" / "val"), "unlabelled_ratio": 0.75}
    within = {"method": "pdf+crosskd", "crosskd.depth": 1}
    method = {"method": "dfd+mgd", "balance": 0.3, **unlabelled} if student == YOLOV8N else within
    distillation = {"teacher": teacher, "teacher_precision": "fp32", "check_teacher": False, "probe": 2}
    length = {"epochs": EPOCHS, "close_mosaic": 2, "nbs": 8, "warmup_epochs": 1.0, "deterministic": True}
    return {**TINY, **distillation, **method, **length, "data": data, "student": student, "save_dir": str(folder)}


def outcome(folder: Path) -> tuple[list[dict[str, float]], list[dict[str, torch.Tensor]]]:
    """Return the rows of results.csv, and the weights of last.pt and best.pt."""
    return repeatable_rows(folder), [saved_weights(folder / "weights" / name) for name in ("last.pt", "best.pt")]


@pytest.fixture(scope="module")
def uninterrupted(data: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives a student's uninterrupted run, trained in a process of its own."""

    @cache
    def folder_of(student: str) -> Path:
        folder = tmp_path_factory.mktemp("uninterrupted") / "run"
        assert run_until(settings(data, teacher, student, folder), "never", 1).returncode == 0
        return folder

    return folder_of


def run_until(keys: dict[str, Any], operation: str, number: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(PROGRAM), operation, str(number), json.dumps(keys)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def check_kill(keys: dict[str, Any], at: tuple[str, int], uninterrupted: Path) -> None:
    folder = Path(keys["save_dir"])
    killed = run_until(keys, *at)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    weights = folder / "weights"
    if (weights / "last.pt").exists():  # then it is complete, and has its sidecar
        epoch = torch.load(weights / "last.pt", weights_only=False)["epoch"]
        states = [torch.load(s, weights_only=True) for s in sidecars(weights / "last.pt")]
        assert epoch < 0 or any(state["epoch"] == epoch for state in states)
    assert run_until({"resume": str(folder)}, "never", 1).returncode == 0
    resumed_rows, resumed_weights = outcome(folder)
    expected_rows, expected_weights = outcome(uninterrupted)
    assert resumed_rows == expected_rows
    assert all(states_equal(a, b) for a, b in zip(resumed_weights, expected_weights, strict=True))
    assert (weights / "MODEL_CARD.md").read_text() == (uninterrupted / "weights" / "MODEL_CARD.md").read_text()
    assert not sidecars(weights / "last.pt")
    assert not list(weights.glob(".*.tmp"))


# Each epoch syncs and renames a sidecar, last.pt and, if it is the best, best.pt; folders are synced as well.
FAST = [("batch", 8)]
SLOW = [
    ("val", EPOCHS + 1),  # one batch of validation an epoch, then the final one
    *(("written", n) for n in (5, 8, 9)), *(("synced", n) for n in (6, 9)), *(("renaming", n) for n in (4, 5, 6)),
    *(("renamed", n) for n in (4, 5, 6)), ("row", 3), ("row written", 3), ("dropping", 6), ("epoch", 4),
    ("stripping", 1), ("stripped", 1), ("stripping", 2), ("stripped", 2),
]  # fmt: skip
# Every operation on a file in the last epoch (each epoch is the best) and in the final evaluation.
LAST = [
    *((name, n) for name in ("renaming", "renamed") for n in range(13, 19)),
    *((name, n) for name in ("written", "synced") for n in range(25, 37)),
    *(("dropping", n) for n in range(17, 25)),
]
RANDOM = [("batch", n) for n in random.Random(0).sample(range(4, 3 * EPOCHS), 4)]


@pytest.mark.parametrize("at", FAST, ids=str)
def test_a_run_that_is_killed_and_resumed_ends_as_an_uninterrupted_one(
    at: tuple[str, int], uninterrupted: Callable[[str], Path], data: str, teacher: str, tmp_path: Path
) -> None:
    check_kill(settings(data, teacher, YOLOV8N, tmp_path / "run"), at, uninterrupted(YOLOV8N))


@pytest.mark.slow
@pytest.mark.parametrize("student", [YOLOV8N, YOLO26N])
@pytest.mark.parametrize("at", [*SLOW, *RANDOM], ids=str)
def test_a_run_killed_at_any_moment_ends_as_an_uninterrupted_one(
    at: tuple[str, int], student: str, uninterrupted: Callable[[str], Path], data: str, teacher: str, tmp_path: Path
) -> None:
    check_kill(settings(data, teacher, student, tmp_path / "run"), at, uninterrupted(student))


@pytest.mark.slow
@pytest.mark.parametrize("at", LAST, ids=str)
def test_a_run_killed_in_its_last_epoch_or_after_it_ends_as_an_uninterrupted_one(
    at: tuple[str, int], uninterrupted: Callable[[str], Path], data: str, teacher: str, tmp_path: Path
) -> None:
    check_kill(settings(data, teacher, YOLOV8N, tmp_path / "run"), at, uninterrupted(YOLOV8N))


def test_a_run_killed_in_its_first_epoch_has_nothing_to_resume(data: str, teacher: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert run_until(settings(data, teacher, YOLOV8N, folder), "batch", 2).returncode == -signal.SIGKILL
    with pytest.raises(UserError, match="no checkpoint there"):
        YoloDistiller().train(resume=str(folder))


def test_another_teacher_is_refused_unless_forced(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    folder = train_one_epoch(tiny, teacher)
    other = str(save_checkpoint(random_detector(YOLOV8S, seed=9), tmp_path / "other.pt"))
    with pytest.raises(UserError, match="teacher: is another than the run began with"):
        YoloDistiller().train(resume=str(folder), teacher=other)
    YoloDistiller().train(resume=str(folder), teacher=other, force=True)


def test_another_teacher_is_refused_also_without_a_sidecar(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    folder = train_one_epoch(tiny, teacher)
    (sidecar,) = sidecars(folder / "weights" / "last.pt")
    sidecar.unlink()
    other = str(save_checkpoint(random_detector(YOLOV8S, seed=9), tmp_path / "other.pt"))
    with pytest.raises(UserError, match="teacher: is another than the run began with"):
        YoloDistiller().train(resume=str(folder), teacher=other)
    copy = shutil.copytree(folder, tmp_path / "copy")
    YoloDistiller().train(resume=str(copy))
    with captured_log() as lines:
        YoloDistiller().train(resume=str(folder), teacher=other, force=True)
    assert any("adapters and optimizer start anew" in line for line in lines)


def test_a_resume_ignores_settings_that_ultralytics_ignores(tiny: dict[str, Any], teacher: str) -> None:
    folder = train_one_epoch(tiny, teacher)
    d = YoloDistiller()
    with captured_log() as lines:
        d.train(resume=str(folder), classes=[0])
    assert any("Resume ignores ['classes']" in line for line in lines)
    assert d.trainer.plan.args.classes is None
    assert len(d.trainer.plan.teachers[0].pairing.classes.student) == 2


def test_a_forced_resume_can_drop_settings(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    both = [teacher, str(save_checkpoint(random_detector(YOLOV8N, seed=9), tmp_path / "other.pt"))]
    keys = {"teacher": both, "stages": [1], "balance": "off", "fitnet.gain": 2.0}
    folder = train_one_epoch(tiny | {k: v for k, v in keys.items() if k != "teacher"}, both)
    d = YoloDistiller(teacher=teacher)
    d.train(resume=str(folder), force=True, stages=None, balance=0.5)
    assert d.trainer.plan.config.stages is None
    assert d.trainer.plan.config.balance == 0.5


def test_the_final_evaluation_alone_can_be_made_in_another_folder(
    tiny: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet")
    train_and_stop(d, tiny, epoch=tiny["epochs"] - 1)
    resumed = YoloDistiller()
    resumed.train(resume=str(d.trainer.save_dir), save_dir=str(tmp_path / "moved"), plots=True)
    moved = tmp_path / "moved"
    assert {"results.csv", "results.png"} <= {file.name for file in moved.iterdir()}
    assert len(rows(resumed.trainer)) == tiny["epochs"]
    assert is_trained(moved / "weights" / "last.pt")
    assert (moved / "weights" / "best.pt").exists()


def test_another_method_resumes_if_forced(tiny: dict[str, Any], teacher: str) -> None:
    folder = train_one_epoch(tiny, teacher)
    settings_with_falling_gain = {"method": "dfd", "balance": "off", "dfd.gain": 1.0, "dfd.schedule": "linear"}
    with captured_log() as lines:
        d = YoloDistiller()
        d.train(resume=str(folder), force=True, **settings_with_falling_gain)
    (row,) = rows(d.trainer)
    assert 0 < row["train/dfd_gain"] <= 1 / d.trainer.epochs  # the schedule continues, too
    assert "fitnet_gain" in (folder / "results-to-1.csv").read_text()
    assert d.trainer.plan.config.method == "dfd"
    assert not any(key.startswith("fitnet.") for key in vars(d.trainer.args))  # or a later resume would refuse them
    assert d.trainer.start_epoch == 1
    assert any("start anew" in line for line in lines)


def test_constants_that_change_shapes_resume_if_forced(tiny: dict[str, Any], teacher: str) -> None:
    folder = train_one_epoch(tiny | {"mgd.hidden": 1.0}, teacher, method="mgd")
    with captured_log() as lines:
        d = YoloDistiller()
        d.train(resume=str(folder), force=True, **{"mgd.hidden": 0.5})
    assert d.trainer.plan.config.method_configs[0].constants["hidden"] == 0.5
    assert any("start anew" in line for line in lines)
    assert len(rows(d.trainer)) == 2


def test_the_same_setting_written_in_another_way_is_no_change(tiny: dict[str, Any], teacher: str) -> None:
    folder = train_one_epoch(tiny | {"levels": [16]}, teacher)
    YoloDistiller().train(resume=str(folder), levels=16)


def test_other_classes_are_refused(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    folder = train_one_epoch(tiny, teacher)
    other = write_dataset(tmp_path / "other", names={0: "disc", 1: "crate"})
    with pytest.raises(UserError, match="data: has other classes"):
        YoloDistiller().train(resume=str(folder), data=str(other))
    fewer = write_dataset(tmp_path / "fewer", names={0: "disc"})
    with pytest.raises(UserError, match="data: has 1 classes, and the run began with 2"):
        YoloDistiller().train(resume=str(folder), data=str(fewer), force=True)
    with pytest.raises(UserError, match=r"techer: unknown key .did you mean teacher"):
        YoloDistiller().train(resume=str(folder), techer=1)


def test_a_teacher_for_a_run_without_one_is_refused(tiny: dict[str, Any], teacher: str) -> None:
    folder = train_one_epoch(tiny, None, method="none")
    with pytest.raises(UserError, match="teacher: would not teach"):
        YoloDistiller(teacher=teacher).train(resume=str(folder))


@pytest.mark.parametrize("method", [None, "fitnet"])
def test_a_run_of_plain_ultralytics_resumes_with_a_warning(
    method: str | None, tiny: dict[str, Any], teacher: str
) -> None:
    model = YOLO(YOLOV8N)
    train_and_stop(model, split_keys(tiny).ultralytics | {"name": "plain"})
    with captured_log() as lines:
        d = YoloDistiller(teacher=teacher, method=method)
        d.train(resume=str(model.trainer.last))
    assert d.trainer.start_epoch == 1
    assert d.trainer.criterion is not None
    assert any("does not continue exactly" in line for line in lines)
    assert [row["epoch"] for row in rows(d.trainer)] == [2]


def test_a_resume_applies_a_new_batch_size_patience_and_freeze(tiny: dict[str, Any], teacher: str) -> None:
    """With another batch size, a step after the warm-up still gathers as many images."""
    folder = train_one_epoch(tiny | {"nbs": 16, "warmup_epochs": 0, "epochs": 3}, teacher)
    seen: dict[str, Any] = {}

    def record(trainer: Any) -> None:
        seen["accumulate"] = int(trainer.accumulate)
        frozen = [p for name, p in trainer.model.named_parameters() if name.startswith("model.0.")]
        seen["frozen"] = [p.grad is None and not p.requires_grad for p in frozen]

    d = YoloDistiller()
    d.add_callback("on_train_batch_start", record)
    d.train(resume=str(folder), batch=2, patience=0, freeze=1)
    assert seen == {"accumulate": 8, "frozen": [True] * 3}
    assert d.trainer.stopper.patience == float("inf")  # Ultralytics' meaning of 0


def test_a_run_without_a_gradient_scaler_resumes_with_one(tiny: dict[str, Any]) -> None:
    """The scaler is off on a CPU, and may be on when the run resumes on a GPU."""
    d = YoloDistiller(method="none")
    train_and_stop(d, tiny)
    state = capture_state(d.trainer, streams_by_rank=[])
    d.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    restore_state(d.trainer, state)
    assert d.trainer.scaler.get_scale() == 8.0


def test_a_restored_random_state_gives_the_same_draws() -> None:
    state = random_state()
    draws = [(random.random(), np.random.rand(), float(torch.rand(1))) for _ in range(2)]
    set_random_state(state)
    assert [(random.random(), np.random.rand(), float(torch.rand(1))) for _ in range(2)] == draws


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of this process's files stands for a full disk."""
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


def test_an_error_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("good")
    with contextlib.suppress(KeyError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    assert path.read_text() == "good"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_at_the_end_of_a_step(number: int, status: int, data: str, tmp_path: Path) -> None:
    folder = tmp_path / "a run"
    settings = {**TINY, "data": data, "epochs": 1000, "method": "none", "save_dir": folder}
    command = [sys.executable, "-m", "yolokd.cli", "train", *(f"{k}={v}" for k, v in settings.items())]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, preexec_fn=reset_ctrl_c, **pipes) as process:
        wait_for(lambda: epochs_of(folder) >= 2)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert errors.splitlines()[-1] == f"yolokd: interrupted; continue with: yolokd train resume='{folder}'"
    last = torch.load(folder / "weights" / "last.pt", weights_only=False)
    assert last["epoch"] + 1 == epochs_of(folder)
    (sidecar,) = sidecars(folder / "weights" / "last.pt")
    assert torch.load(sidecar, weights_only=True)["epoch"] == last["epoch"]


@pytest.mark.usefixtures("_default_signals")
def test_a_signal_after_the_last_step_ends_the_finished_run(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    d = YoloDistiller(method="none")
    d.add_callback("on_train_end", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="the training is finished"), captured_log() as lines:
        d.train(**{k: v for k, v in tiny.items() if k != "project"} | {"epochs": 1})
    assert d.trainer.best == tmp_path / "runs" / "distill" / "train" / "weights" / "best.pt"
    assert d.trainer.best.exists()
    assert d.trainer.args.project is None  # loggers take it for a name that the user chose
    stripped = [line for line in lines if "Optimizer stripped" in line]
    assert len(stripped) == 2
    assert all(f"saved as {d.trainer.wdir}" in line and ".tmp" not in line for line in stripped)


@pytest.mark.usefixtures("_default_signals")
def test_a_data_worker_killed_by_the_same_signal_is_no_error(tiny: dict[str, Any]) -> None:
    """torch raises this error if a signal went to the whole process group."""

    def end(_trainer: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    d = YoloDistiller(method="none")
    d.add_callback("on_train_batch_start", end)
    with pytest.raises(Interrupted, match="no finished epoch") as interrupted:
        d.train(**tiny)
    assert interrupted.value.signum == signal.SIGTERM


@pytest.mark.usefixtures("_default_signals")
def test_a_run_without_a_finished_epoch_does_not_offer_an_older_runs_checkpoint(tiny: dict[str, Any]) -> None:
    folder = train_one_epoch(tiny, None, method="none")
    time.sleep(1.1)  # some file systems store times in whole seconds
    d = YoloDistiller(method="none")
    d.add_callback("on_train_batch_start", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="no finished epoch"):
        d.train(**tiny | {"save_dir": str(folder)})


def test_resume_true_means_the_named_checkpoint_or_else_the_latest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics documents resume=True with model=CHECKPOINT."""
    monkeypatch.chdir(tmp_path)
    runs = [tmp_path / "runs" / "distill" / name / "weights" / "last.pt" for name in ("train", "train-2")]
    for last in runs:
        last.parent.mkdir(parents=True)
        last.touch()
        time.sleep(0.02)
    named = runs[0].relative_to(tmp_path)
    assert _resume_overrides({"resume": True})["resume"] == str(runs[1])
    assert _resume_overrides({"resume": True, "model": str(named)})["resume"] == str(runs[0])
    assert _resume_overrides({"resume": True, "student": str(named)})["resume"] == str(runs[0])
    assert _resume_overrides({"resume": True, "student": "yolov8n.pt"})["resume"] == str(runs[1])


def reset_ctrl_c() -> None:
    """Restore the default action of SIGINT, which processes in the background ignore."""
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


def test_a_folder_in_which_a_training_writes_is_refused(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    folder = train_one_epoch(tiny, teacher)
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    (link := tmp_path / "link").symlink_to(folder.parent)
    by_name = {k: v for k, v in tiny.items() if k != "save_dir"} | {"exist_ok": True, "name": folder.name}
    with FileLock(folder / LOCK_FILE):
        for keys in (
            {"resume": str(folder)},
            {"resume": str(link / folder.name)},
            {**tiny, "save_dir": str(folder), "method": "none"},
            {**by_name, "project": str(folder.parent), "method": "none"},
            {**by_name, "project": str(link), "method": "none"},
        ):
            with pytest.raises(UserError, match="another training is writing into this folder"):
                YoloDistiller().train(**keys)
    assert content == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    YoloDistiller().train(resume=str(folder))  # the lock is released


@pytest.mark.parametrize("name", ["real", "link", "real/../real"])
def test_a_lock_is_inherited_whatever_the_folder_is_called(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.delenv(VARIABLE, raising=False)
    folder = tmp_path / name
    with FileLock(tmp_path / "real" / LOCK_FILE):
        with pytest.raises(UserError, match="another training is writing"):
            FolderLock().take(folder)
        inherit_lock(folder)  # as the parent of a training of `compare` does
        FolderLock().take(folder)
        FolderLock().take(folder.resolve())  # as Ultralytics calls it


def change_labels(folder: Path, data: Path) -> None:
    label = next((data / "labels" / "train").glob("*.txt"))
    label.write_text(label.read_text().replace("0 ", "1 ", 1) if label.read_text().startswith("0") else "0 .5 .5 .2 .2")


def pretend_other_cores(folder: Path, data: Path) -> None:
    (path,) = sidecars(folder / "weights" / "last.pt")
    torch.save(torch.load(path, weights_only=True) | {"threads": 64}, path)


def take_sidecar_of_another_run(folder: Path, data: Path) -> None:
    (path,) = sidecars(folder / "weights" / "last.pt")
    state = torch.load(path, weights_only=True)
    state["ema"]["state"] = {key: value + 1 for key, value in state["ema"]["state"].items()}
    torch.save(state, path)


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (change_labels, "not exact, because images or labels have changed"),
        (pretend_other_cores, "not exact, the run began with 64 threads"),
        (take_sidecar_of_another_run, "belongs to another run, and is ignored"),
    ],
)
def test_a_resume_that_cannot_be_exact_says_so(
    change: Callable[[Path, Path], None], warning: str, tiny: dict[str, Any], tmp_path: Path
) -> None:
    data = write_dataset(tmp_path / "data")
    folder = train_one_epoch(tiny | {"data": str(data)}, None, "none")
    change(folder, data.parent)
    with captured_log() as lines:
        YoloDistiller().train(resume=str(folder), student=YOLOV8S)
    assert any(warning in line for line in lines)
    assert any(f"student={YOLOV8S} is ignored" in line for line in lines)


def test_a_stop_after_the_clock_was_set_back_says_how_to_resume(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    d = YoloDistiller(method="none")

    def set_clock_back(trainer: Any) -> None:
        os.utime(trainer.last, (1, 1))

    d.add_callback("on_model_save", set_clock_back)
    d.add_callback("on_train_epoch_start", lambda t: signal.raise_signal(signal.SIGTERM) if t.epoch else None)
    with pytest.raises(Interrupted, match="continue with: yolokd train resume="):
        d.train(**tiny | {"save_dir": str(tmp_path / "run")})


def test_resume_true_takes_the_latest_unfinished_run(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = {k: v for k, v in tiny.items() if k != "project"} | {"student": YOLOV8N, "method": "none"}
    unfinished = YoloDistiller(**settings)
    train_and_stop(unfinished, {})
    YoloDistiller(**settings).train(epochs=1)
    assert _resume_overrides({"resume": True})["resume"] == str(unfinished.trainer.last)
