"""Training in two processes: launched by Ultralytics, by torchrun, and on two machines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.launches import TORCHRUN, assert_processes_agree, last_weights, launch, output_of, settings
from helpers.models import YOLOV8N, random_detector, save_checkpoint
from helpers.results import repeatable_rows, states_equal
from ultralytics.utils.dist import find_free_network_port


@pytest.fixture(autouse=True)
def _all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTEST_XDIST_WORKER", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def processes_ended(folder: Path) -> bool:
    """Return whether the processes that trained in a folder end within a minute."""
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


def with_much_state(data: str, teacher: str, folder: Path) -> dict[str, Any]:
    """Return the settings of a run with balanced gains and unlabelled images."""
    return settings(data, teacher, folder, balance=0.3, unlabelled=str(Path(data).parent / "images" / "val"))


@pytest.fixture(scope="module")
def launched(data: str, teacher: str, batch: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run `with_much_state` that Ultralytics launched."""
    folder = tmp_path_factory.mktemp("launched") / "run"
    output_of(launch(with_much_state(data, teacher, folder), LAUNCH="1"))
    return folder


def test_a_run_launched_by_ultralytics_distils_and_writes_all_files(launched: Path, teacher: str) -> None:
    results = repeatable_rows(launched)
    assert len(results) == 3
    assert all(row["train/dfd_loss"] > 0 and row["level/P3/pdf_gain"] > 0 for row in results)
    student = torch.load(launched / "weights" / "best.pt", weights_only=False)["model"]
    assert student.yolokd["teacher"]["file"] == Path(teacher).name
    assert student.yolokd["balance"] == 0.3
    assert "balance: 0.3" in (launched / "distill.yaml").read_text()
    assert sorted(p.name for p in (launched / "weights").iterdir()) == ["MODEL_CARD.md", "best.pt", "last.pt"]
    assert processes_ended(launched)


def test_adapters_and_gains_are_the_same_in_all_processes(launched: Path) -> None:
    assert_processes_agree(launched)


def test_each_process_gets_its_share_of_the_unlabelled_images(launched: Path) -> None:
    """Three epochs of three batches with two labelled images for each process, and so with two unlabelled ones."""
    files = [(launched / f"unlabelled-{rank}.txt").read_text().split() for rank in (0, 1)]
    assert [len(each) for each in files] == [18, 18]
    assert [*Counter(files[0] + files[1]).values()] == [6] * 6  # six passes over the six images


def test_two_processes_compute_the_gradient_of_the_whole_batch(
    data: str, teacher: str, batch: str, tmp_path: Path
) -> None:
    student = save_checkpoint(random_detector(YOLOV8N, seed=5), tmp_path / "student.pt")
    constant = {
        "dfd.schedule": "constant",
        "pdf.schedule": "constant",
    }  # one process computes the halves one step apart
    keys = {
        "balance": "off",
        "epochs": 1,
        "model": str(student),
        **constant,
    }  # a .yaml would give random weights that differ
    both = launch(
        settings(data, teacher, tmp_path / "both", **keys), *TORCHRUN, "--standalone", "--nproc_per_node=2", BATCH=batch
    )
    output_of(both)
    output_of(launch(settings(data, teacher, tmp_path / "one", **keys), BATCH=batch))
    expected = torch.load(tmp_path / "one" / "gradient--1.pt")
    assert any(key.startswith("criterion.") for key in expected)
    for rank in (0, 1):
        gradients = torch.load(tmp_path / "both" / f"gradient-{rank}.pt")
        assert gradients.keys() == expected.keys()
        for key, gradient in expected.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("kill", ["1:4", "0:5", "1:end"])
def test_a_killed_process_ends_the_launch_and_a_resume_ends_as_an_uninterrupted_run(
    kill: str, launched: Path, data: str, teacher: str, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    keys = with_much_state(data, teacher, folder)
    output = output_of(launch(keys, LAUNCH="1", KILL=kill), status=2)
    assert "yolokd train resume=" in output
    assert processes_ended(folder)
    output_of(launch({"resume": str(folder / "weights" / "last.pt"), "save_dir": str(folder)}, LAUNCH="1"))
    assert repeatable_rows(folder) == repeatable_rows(launched)
    assert states_equal(last_weights(folder), last_weights(launched))


@pytest.mark.slow
def test_a_nonfinite_loss_in_one_process_leaves_all_processes_equal(data: str, teacher: str, tmp_path: Path) -> None:
    keys = settings(data, teacher, tmp_path / "run", balance=0.3)
    output_of(
        launch(keys, LAUNCH="1", NAN="1:3")
    )  # a step in which gradients are measured: the other process waits for the norms
    assert [row["distill/dropped"] for row in repeatable_rows(tmp_path / "run")] == [1, 0, 0]
    assert_processes_agree(tmp_path / "run")


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_all_processes(data: str, teacher: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = launch(settings(data, teacher, folder, epochs=200), LAUNCH="1")
    while not (folder / "weights" / "last.pt").exists():
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output_of(process, status=143)
    assert processes_ended(folder)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(data: str, teacher: str, tmp_path: Path) -> None:
    keys = settings(data, teacher, tmp_path / "run", epochs=50)
    output = output_of(launch(keys, *TORCHRUN, "--nproc_per_node=2", INTERRUPT="1:5"), status=1)
    assert output.count("yolokd: interrupted; continue with: yolokd train resume=") == 1
    assert [(tmp_path / "run" / f"batches-{rank}.txt").read_text() for rank in (0, 1)] == ["7", "7"]


@pytest.mark.slow
def test_processes_that_see_different_images_end_before_training(data: str, teacher: str, tmp_path: Path) -> None:
    other = tmp_path / "data"
    shutil.copytree(Path(data).parent, other)
    next((other / "images" / "train").glob("*.jpg")).unlink()
    keys = settings(data, teacher, tmp_path / "run")
    process = launch(keys, *TORCHRUN, "--nproc_per_node=2", DATA_OF_RANK_1=str(other / "data.yaml"))
    output = output_of(process, status=1)
    assert "data: process 1 sees 11 training images, process 0 sees 12" in output
    assert not (tmp_path / "run" / "results.csv").exists()


@pytest.mark.slow
def test_a_process_that_stops_for_good_ends_the_training_after_a_while(data: str, teacher: str, tmp_path: Path) -> None:
    keys = settings(data, teacher, tmp_path / "run", epochs=50)
    output = output_of(launch(keys, *TORCHRUN, "--nproc_per_node=2", STOP="1:5", YOLOKD_STEP_TIMEOUT="0.1"), status=1)
    assert "another process has not answered for 0:00:06" in output
    assert "continue with: yolokd train resume=" in output


@pytest.mark.slow
def test_two_machines_train_as_two_processes_of_one(launched: Path, data: str, teacher: str, tmp_path: Path) -> None:
    keys = with_much_state(data, teacher, tmp_path / "run")
    machine = [
        *TORCHRUN,
        "--nnodes=2",
        "--nproc_per_node=1",
        "--master_addr=127.0.0.1",
        f"--master_port={find_free_network_port()}",
    ]
    cores = (sorted(os.sched_getaffinity(0)) * 2)[:2]  # one core each, like the processes of one machine
    processes = [launch(keys, *machine, f"--node_rank={rank}", core=core) for rank, core in enumerate(cores)]
    for process in processes:
        output_of(process)
    assert repeatable_rows(tmp_path / "run") == repeatable_rows(launched)
    assert states_equal(last_weights(tmp_path / "run"), last_weights(launched))


@pytest.mark.slow
def test_processes_of_torchrun_use_one_folder_and_print_an_error_once(data: str, teacher: str, tmp_path: Path) -> None:
    arguments = [f"data={data}", f"teacher={teacher}", f"student={YOLOV8N}", "epochs=1", "imgsz=64", "batch=4"]
    arguments += ["check_teacher=False", "plots=False", f"project={tmp_path}", "device=cpu"]
    command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--no-python", "yolokd", "train", *arguments]
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
