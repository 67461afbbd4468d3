"""Two processes train as one would: under Ultralytics' own launch, under torchrun, on several machines."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import TINY, random_detector, save_checkpoint, states_equal
from ultralytics.utils.dist import find_free_network_port

SCRIPT = str(Path(__file__).with_name("launched.py"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(autouse=True)
def _all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTEST_XDIST_WORKER", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def settings(data: str, teacher: str, folder: Path, **more: Any) -> dict[str, Any]:
    own = {"teacher": teacher, "teacher_precision": "fp32", "check_teacher": False, "method": "dfd+pdf", "probe": 2}
    length = {"epochs": 3, "close_mosaic": 1, "deterministic": True, "device": "cpu", "val": True}
    placed = {"data": data, "model": "yolov8n.yaml", "save_dir": str(folder)}
    return {**TINY, **own, **length, **placed, "level_weights": "uniform", **more}


def launch(keys: dict[str, Any], *before: str, core: int | None = None, **env: str) -> subprocess.Popen[str]:
    command = [*before, SCRIPT, json.dumps(keys)] if before else [sys.executable, SCRIPT, json.dumps(keys)]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **env},
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
    )  # fmt: skip


def finished(process: subprocess.Popen[str], status: int = 0) -> str:
    said, _ = process.communicate(timeout=120)
    assert process.returncode == status, said[-4000:]
    return said


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as f:
        return [{k: v for k, v in row.items() if k != "time"} for row in csv.DictReader(f)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights" / "last.pt", weights_only=False)["model"].state_dict()


def held(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(folder / f"held-{rank}.pt", weights_only=True) for rank in (0, 1)]


def gone(folder: Path) -> bool:
    """Whether the processes that trained there have ended."""
    pids = [int(pid) for file in folder.glob("pids-*.txt") for pid in file.read_text().split()]
    assert pids
    deadline = time.time() + 60
    while time.time() < deadline and any(map(psutil.pid_exists, pids)):
        time.sleep(0.5)
    return not any(map(psutil.pid_exists, pids))


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> str:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("batch") / "batch.pt"
    boxes = torch.rand(6, 4) * 0.4 + 0.3
    labels = {"batch_idx": torch.tensor([0.0, 0, 1, 2, 3, 3]), "cls": torch.tensor([[0.0], [1], [1], [0], [0], [1]])}
    torch.save({"img": torch.rand(4, 3, 64, 64), "bboxes": boxes, **labels}, path)
    return str(path)


@pytest.fixture(scope="module")
def launched(data: str, teacher: str, batch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run under Ultralytics' own launch, its gains balanced."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    finished(launch(settings(data, teacher, folder, balance=0.3), LAUNCH="1"))
    return folder


def test_the_launched_processes_rebuild_the_training(launched: Path, teacher: str) -> None:
    found = rows(launched)
    assert len(found) == 3
    assert all(float(row["train/dfd_loss"]) > 0 and float(row["level/P3/pdf_gain"]) > 0 for row in found)
    student = torch.load(launched / "weights" / "best.pt", weights_only=False)["model"]
    assert student.yolokd["teacher"]["file"] == Path(teacher).name
    assert student.yolokd["balance"] == 0.3
    assert "balance: 0.3" in (launched / "distill.yaml").read_text()
    assert sorted(p.name for p in (launched / "weights").iterdir()) == ["best.pt", "last.pt"]
    assert gone(launched)


def test_adapters_and_gains_are_the_same_in_all_processes(launched: Path) -> None:
    check_equal(launched)


def check_equal(folder: Path) -> None:
    first, second = held(folder)
    assert any(key.endswith("balance.pull") for key in first)
    normalization = ("running_mean", "running_var")  # each process sees its own images
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first if not k.endswith(normalization))


def test_two_processes_give_the_gradient_of_the_sum_of_both_halves(
    data: str, teacher: str, batch: str, tmp_path: Path
) -> None:
    student = save_checkpoint(random_detector("yolov8n.yaml", seed=5), tmp_path / "student.pt")
    constant = {"dfd.schedule": "constant", "pdf.schedule": "constant"}  # one process takes the halves one step apart
    keys = {"balance": "off", "epochs": 1, "model": str(student), **constant}  # from scratch, weights would differ
    both = launch(
        settings(data, teacher, tmp_path / "both", **keys), *TORCHRUN, "--standalone", "--nproc_per_node=2", BATCH=batch
    )
    finished(both)
    finished(launch(settings(data, teacher, tmp_path / "one", **keys), BATCH=batch))
    expected = torch.load(tmp_path / "one" / "gradient--1.pt")
    assert any(key.startswith("criterion.") for key in expected)
    for rank in (0, 1):
        found = torch.load(tmp_path / "both" / f"gradient-{rank}.pt")
        assert found.keys() == expected.keys()
        for key, gradient in expected.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["1:4", "0:5", "1:end"])
def test_a_killed_process_fails_the_launch_and_a_resume_ends_as_if_nothing_had_happened(
    kill: str, launched: Path, data: str, teacher: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    keys = settings(data, teacher, folder, balance=0.3)
    said = finished(launch(keys, LAUNCH="1", KILL=kill), status=2)
    assert "yolokd train resume=" in said
    assert gone(folder)
    finished(launch({"resume": str(folder / "weights" / "last.pt"), "save_dir": str(folder)}, LAUNCH="1"))
    assert rows(folder) == rows(launched)
    assert states_equal(weights(folder), weights(launched))


@pytest.mark.slow
def test_what_one_process_drops_leaves_all_of_them_equal(data: str, teacher: str, tmp_path: Path) -> None:
    keys = settings(data, teacher, tmp_path / "run", balance=0.3)
    finished(launch(keys, LAUNCH="1", NAN="1:3"))  # a step that measures: the other waits for its norms
    assert [int(row["distill/dropped"]) for row in rows(tmp_path / "run")] == [1, 0, 0]
    check_equal(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_all_processes(data: str, teacher: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch(settings(data, teacher, folder, epochs=200), LAUNCH="1")
    while not (folder / "weights" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    finished(process, status=143)
    assert gone(folder)


@pytest.mark.slow
def test_two_machines_train_as_two_processes_of_one(launched: Path, data: str, teacher: str, tmp_path: Path) -> None:
    keys = settings(data, teacher, tmp_path / "run", balance=0.3)
    machine = [
        *TORCHRUN,
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={find_free_network_port()}",
    ]
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]  # a core each, as the processes of one machine have
    processes = [launch(keys, *machine, f"--node_rank={rank}", core=core) for rank, core in enumerate(cores)]
    for process in processes:
        finished(process)
    assert rows(tmp_path / "run") == rows(launched)
    assert states_equal(weights(tmp_path / "run"), weights(launched))


@pytest.mark.slow
def test_torchrun_names_one_folder_and_says_what_does_not_fit_once(data: str, teacher: str, tmp_path: Path) -> None:
    words = [f"data={data}", f"teacher={teacher}", "student=yolov8n.yaml", "epochs=1", "imgsz=64", "batch=4"]
    words += ["check_teacher=False", "plots=False", f"project={tmp_path}", "device=cpu"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--no-python", "yolokd", "train", *words]
    for folder in ("train", "train-2"):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert (tmp_path / folder / "weights" / "best.pt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train", "train-2"]
    alone = [word for word in command if not word.startswith("batch=")]
    for word, why in (("method=dfx", "no method 'dfx'"), ("batch=1", "batch=1: leaves nothing to some of 2 devices")):
        refused = subprocess.run([*alone, word], capture_output=True, text=True, timeout=300)
        assert refused.returncode != 0
        assert refused.stderr.count(why) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["train", "train-2"]
