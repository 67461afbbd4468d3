"""`yolokd compare launcher=ray`: runs on a Ray cluster, on nodes that are lost, and after Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest
import ray
from helpers.models import YOLOV8N
from helpers.runs import TINY
from ray.cluster_utils import Cluster

from yolokd.commands.compare import run_compare
from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers import claim, ray_cluster, ray_connection
from yolokd.commands.compare.launchers.claim import Claim, place_of, revoke
from yolokd.commands.compare.launchers.process import locked, train_in_process
from yolokd.commands.compare.launchers.ray_nodes import Needs, check_files, check_nodes
from yolokd.commands.compare.ledger import read
from yolokd.errors import UserError

EPOCHS = 12
Found = TypeVar("Found")


@pytest.fixture
def keys(data: str, tmp_path: Path) -> dict[str, Any]:
    """Return the keys of a comparison on a Ray cluster."""
    settings = {k: v for k, v in TINY.items() if k in ("imgsz", "batch", "nbs", "device", "report")}
    settings |= {"data": data, "student": YOLOV8N}
    return {**settings, "project": tmp_path / "c", "method": "none", "seeds": 0, "launcher": "ray"}


@pytest.fixture(scope="module")
def one_cpu() -> Iterator[None]:
    """Connect this process to a Ray cluster of one node with one CPU."""
    ray.init(address="local", num_cpus=1, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("one_cpu")
def test_a_cluster_executes_runs_once(keys: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run_compare(**keys, epochs=1)
    out = capsys.readouterr().out
    assert "Ray: 1 of 1 nodes can execute runs, up to 1 at the same time" in out
    assert "none seed 0: runs on " in out
    (run,) = keys["project"].glob("none-*")
    assert not place_of(run)
    ledger, trained = keys["project"] / "compare.csv", (run / "weights" / "last.pt").stat().st_mtime_ns
    assert [row.method for row in read(ledger).values()] == ["none"]
    held = ledger.read_bytes()
    run_compare(**keys, epochs=1)
    assert ledger.read_bytes() == held
    ledger.unlink()  # the scores in the run's folder are enough
    run_compare(**keys, epochs=1)
    assert ledger.read_bytes() == held
    assert (run / "weights" / "last.pt").stat().st_mtime_ns == trained
    assert ray.is_initialized()  # a connection of the user's program is kept


@pytest.mark.usefixtures("one_cpu")
@pytest.mark.parametrize(
    ("needs", "says"),
    [
        (Needs(1, 1), "no node of the cluster has cpus=1 and a GPU for a run (add such a node, or give device=cpu)"),
        (Needs(2, 0), "no node of the cluster has cpus=2 for a run (add such a node or a smaller cpus=)"),
    ],
)
def test_a_cluster_that_can_execute_no_run_is_refused(needs: Needs, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        check_nodes([make_run(tmp_path / "c")], needs)
    assert says in str(error.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.usefixtures("one_cpu")
def test_a_node_that_does_not_see_a_file_is_named() -> None:
    with pytest.raises(UserError, match=r"node .* does not see /absent/d.yaml"):
        check_files(["/absent/d.yaml"], ray.nodes())


@pytest.mark.usefixtures("one_cpu")
def test_a_cluster_that_has_lost_its_nodes_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    places = ray_cluster._Places({}, Needs(2, 0))
    assert places() == {}
    monkeypatch.setattr(ray_cluster, "NODE_SECONDS", 0.0)
    with pytest.raises(RuntimeError, match="the cluster has lost all nodes"):
        places()


def test_a_cluster_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert ray_connection._find_cluster() == address
    with pytest.raises(UserError, match=f"RAY_ADDRESS={address}: no cluster answers there"):
        ray_connection._find_cluster()
    monkeypatch.delenv("RAY_ADDRESS")
    crashed = tmp_path / "ray_current_cluster"
    crashed.write_text(address)
    monkeypatch.setattr(ray_connection, "CURRENT_CLUSTER", crashed)
    assert ray_connection._find_cluster() == "local"


def test_without_ray_the_error_says_how_to_install_it(keys: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as Python does for a module that it must not find
    with pytest.raises(UserError, match=r"launcher=ray: Ray is not installed \(pip install 'yolokd\[ray\]'\)"):
        run_compare(**keys)


def make_run(project: Path, **keys: Any) -> ComparisonRun:
    return ComparisonRun(method="none", seed=0, split="val", keys=keys, config="", ground="", project=project)


def test_a_process_gives_way_when_another_one_claims_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "HANDOVER_SECONDS", 0.0)
    run = make_run(tmp_path)
    first, second = Claim(run.folder, "lost"), Claim(run.folder, "new")
    with locked(run), first.held():
        assert (place_of(run.folder), first.is_valid()) == ("lost", True)
        with second.held():
            assert (place_of(run.folder), first.is_valid(), second.is_valid()) == ("new", False, True)
            with pytest.raises(RuntimeError, match="none with seed 0 failed"):
                train_in_process(run, "cpu", first)
        assert place_of(run.folder) == ""
    with first.held():
        revoke(run.folder)
        assert not first.is_valid()


def start(keys: dict[str, Any], out: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `yolokd compare` as a process of its own, which writes into the file `out`."""
    command = [sys.executable, "-m", "yolokd.cli", "compare", *(f"{k}={v}" for k, v in keys.items())]
    with open(out, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=file, text=True, env={**os.environ, **environment})


def wait_for(condition: Callable[[], Found], process: subprocess.Popen[str] | None = None) -> Found:
    """Return what `condition` returns, as soon as it is true; fail if that takes minutes, or if the process ends."""
    deadline = time.monotonic() + 200
    while not (found := condition()):
        assert time.monotonic() < deadline
        assert process is None or process.poll() is None
        time.sleep(0.05)
    return found


def epochs_done(run: Path) -> int:
    results = run / "results.csv"
    return len(results.read_text().splitlines()) - 1 if results.exists() else 0


def trainings_in(folder: Path) -> list[psutil.Process]:
    """Return the processes of runs in a folder: each has its run's log open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has ended
            logs = [Path(file.path) for file in process.open_files() if file.path.endswith("/log.txt")]
            if any(log.is_relative_to(folder) for log in logs):
                found.append(process)
    return found


@pytest.mark.slow
def test_ctrl_c_stops_all_runs_and_the_same_command_goes_on(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"epochs": EPOCHS, "seeds": "0,1"}
    process = start(keys, tmp_path / "out.txt", RAY_ADDRESS="local")
    wait_for(lambda: [run for run in keys["project"].glob("none-*") if epochs_done(run) > 1], process)
    assert trainings_in(keys["project"])
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert trainings_in(keys["project"]) == []
    out = (tmp_path / "out.txt").read_text()
    assert process.returncode == 130, out
    assert "interrupted; repeat the same command to continue" in out
    assert not read(keys["project"] / "compare.csv")
    assert start(keys, tmp_path / "out.txt", RAY_ADDRESS="local").wait(300) == 0
    assert [len(row.epochs) for row in read(keys["project"] / "compare.csv").values()] == [EPOCHS] * 2
    assert any("Resuming" in log.read_text() for log in keys["project"].glob("none-*/log.txt"))


IMPORT_ON_A_NODE = """
import ray
from yolokd.commands.compare.launchers.ray_connection import connected
def work():
    import colorsys
with connected():
    ray.get(ray.remote(work).remote())
"""


@pytest.mark.slow
def test_no_module_in_the_working_folder_runs_on_a_node(tmp_path: Path) -> None:
    """It may be the folder of a stranger, and Ray lets nodes import from it."""
    (tmp_path / "colorsys.py").write_text("raise SystemExit('a module of the working folder runs')")
    environment = os.environ | {"PYTHONSAFEPATH": "1", "RAY_ADDRESS": "local"}
    command = [sys.executable, "-c", IMPORT_ON_A_NODE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def nodes() -> Iterator[list[Any]]:
    """Start a Ray cluster, to which this process is not connected; return its nodes for runs, with one CPU each."""
    ray.shutdown()
    soon = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_timeout_ms": 1000}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": {**soon, "health_check_failure_threshold": 4}}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield [cluster.add_node(num_cpus=1) for _ in range(3)]
    cluster.shutdown()


def lose(node: Any, how: str) -> None:
    """Kill a node with all its processes, or only the one that represents it in the cluster."""
    if how == "killed":
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
    else:
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()  # its workers would take a zombie for alive


def resumes(run: Path) -> int:
    """Return how often a run has gone on from a checkpoint."""
    log = run / "log.txt"
    return log.read_text().count("Resuming") if log.exists() else 0


@pytest.mark.slow
def test_the_runs_of_lost_nodes_go_on_elsewhere(keys: dict[str, Any], nodes: list[Any], tmp_path: Path) -> None:
    keys |= {"epochs": 60, "seeds": "0,1"}
    process = start(keys, tmp_path / "out.txt", RAY_ADDRESS=nodes[0].gcs_address)
    run = wait_for(lambda: next(keys["project"].glob("none-seed0-*"), None), process)

    def node_of_run() -> Any:
        return next((node for node in nodes if f"({node.node_id[:8]})" in place_of(run)), None)

    def lose_node_of_run(how: str, losses: int) -> None:
        """Lose the node as soon as the run has trained there; it must claim another one, and its process must end."""
        wait_for(lambda: node_of_run() and resumes(run) >= losses and trainings_in(run), process)
        before = epochs_done(run)
        wait_for(lambda: epochs_done(run) > before + 1, process)
        node, (training,) = node_of_run(), trainings_in(run)
        lose(node, how)
        nodes.remove(node)
        wait_for(node_of_run, process)
        wait_for(lambda: training not in trainings_in(run), process)
        assert epochs_done(run) < 60

    for losses, how in enumerate(("without raylet", "killed")):
        lose_node_of_run(how, losses)
    assert process.wait(300) == 0
    assert resumes(run) >= 2
    assert (tmp_path / "out.txt").read_text().count("none seed 0: runs on ") >= 3
    ledger = keys["project"] / "compare.csv"
    assert sorted((row.seed, len(row.epochs)) for row in read(ledger).values()) == [(0, 60), (1, 60)]
    lines = ledger.read_text().splitlines()
    assert len(lines) == 3
    trained = {file: file.stat().st_mtime_ns for file in keys["project"].glob("*/weights/*.pt")}
    run_compare(**{**keys, "seeds": (0, 1)})
    assert ledger.read_text().splitlines() == lines
    assert {file: file.stat().st_mtime_ns for file in trained} == trained
