"""Comparisons: their statistics, their ledger, and real small ones as a user runs them."""

from __future__ import annotations

import subprocess
import sys
import time
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, random_detector, save_checkpoint

from yolokd.compare import run_compare
from yolokd.compare.ledger import Row, append, read
from yolokd.compare.show import markdown
from yolokd.compare.statistics import interval, labelled, summarize
from yolokd.errors import UserError


def row(method: str, seed: int, score: float, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "hash": f"{method}{seed}", "method": method, "seed": seed, "split": "val", "teacher": "t.pt",
        "student": "s.yaml", "data": "d.yaml", "settings": "epochs=2", "map": score, "map50": score,
        "ap_small": None, "ap_medium": 0.1, "ap_large": 0.2, "seconds": 1.0, "images_per_second": 2.0,
        "yolokd": "0", "ultralytics": "0", "torch": "0", "curve": "0.1 0.2",
    }  # fmt: skip
    return Row(**values | changes)


def summaries(*rows: Row, teacher: float = 0.6) -> dict[str, Any]:
    return {s.method: s for s in summarize(rows, "none", row("teacher", 0, teacher))}


def test_the_interval_is_students_t() -> None:
    found = interval([1.0, 2.0, 4.0])
    # t(0.975, 2) = 4.302653 and s = 1.527525, from tables
    half = 4.302653 * 1.527525 / sqrt(3)
    assert found.mean == pytest.approx(7 / 3)
    assert found.low == pytest.approx(7 / 3 - half, abs=1e-5)
    assert found.high == pytest.approx(7 / 3 + half, abs=1e-5)


def test_a_method_is_paired_with_the_baselines_seeds() -> None:
    base = [row("none", 0, 0.40), row("none", 1, 0.50), row("none", 2, 0.45)]
    found = summaries(*base, row("dfd", 1, 0.52), row("dfd", 0, 0.42), row("dfd", 7, 0.1))["dfd"]
    assert found.difference.mean == pytest.approx(0.02)
    assert (found.pairs, found.improved) == (2, 2)
    assert found.share.mean == pytest.approx(0.02 / (0.6 - 0.45))  # over the baseline's mean of those seeds


def test_no_loss_and_no_noise_becomes_a_win() -> None:
    base = [row("none", s, 0.4) for s in range(3)]
    noisy = [row("noisy", s, 0.4 + d) for s, d in enumerate((0.05, -0.01, 0.03))]
    worse = [row("worse", s, 0.38 + s / 1000) for s in range(3)]
    better = [row("better", s, 0.43 + s / 1000) for s in range(3)]
    found = summaries(*base, *noisy, *worse, *better, row("once", 0, 0.9))
    assert found["noisy"].verdict == "no clear difference"
    assert found["worse"].verdict == "worse"
    assert found["worse"].difference.mean < 0
    assert found["better"].verdict == "better"
    assert found["once"].verdict == "one seed: nothing to say"
    assert found["none"].verdict == "baseline"
    assert summaries(*base, row("elsewhere", 7, 0.9))["elsewhere"].verdict == "no seed of the baseline's"


def test_what_differs_in_its_settings_is_another_method() -> None:
    rows = [row("none", 0, 0.4), row("dfd", 0, 0.5, settings="epochs=2 balance=0.3"), row("dfd", 0, 0.6)]
    common, found = labelled(rows)
    assert common == "epochs=2"
    assert [r.method for r in found] == ["none", "dfd balance=0.3", "dfd"]
    common, found = labelled([rows[0], rows[1], row("pdf", 0, 0.5, settings="epochs=2 balance=0.3 pdf.box=1.0")])
    assert common == "epochs=2 balance=0.3 pdf.box=1.0"
    assert [r.method for r in found] == ["none", "dfd", "pdf"]


def test_without_a_gap_no_share_is_claimed() -> None:
    assert summaries(row("none", 0, 0.4), row("dfd", 0, 0.5), teacher=0.3)["dfd"].share is None


def test_the_ledger_gives_back_what_it_was_given(tmp_path: Path) -> None:
    rows = [row("none", 0, 0.4), row("dfd+pdf", 1, 0.5, settings="a, b"), row("teacher", 0, 0.6, curve="", student="")]
    for r in rows:
        append(tmp_path / "new" / "c.csv", r)
    assert list(read(tmp_path / "new" / "c.csv").values()) == rows


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "hash,method\nx", "\x00"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(content)
    with pytest.raises(UserError, match="no comparison's CSV"):
        run_compare(csv=str(path))


def compare(keys: dict[str, Any], **more: Any) -> subprocess.CompletedProcess[str]:
    words = [f"{k}={v}" for k, v in {**keys, **more}.items()]
    command = [sys.executable, "-m", "yolokd.cli", "compare", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.fixture
def keys(data: str, teacher: str, tmp_path: Path) -> dict[str, Any]:
    settings = {k: v for k, v in TINY.items() if k in ("imgsz", "batch", "nbs")}
    return {**settings, "data": data, "teacher": teacher, "epochs": 2, "project": tmp_path / "c", "seeds": 0}


def test_what_the_csv_holds_is_not_run_again(keys: dict[str, Any], tmp_path: Path) -> None:
    first = compare(keys, method="none,native,dfd", amp="bf16", device="cpu,cpu")  # two at once
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "c"
    held = read(folder / "compare.csv")
    assert sorted(r.method for r in held.values()) == ["dfd", "native", "none", "teacher"]
    assert all(len(r.epochs) == 2 for r in held.values() if r.method != "teacher")
    for name in ("compare-summary.md", "compare-summary.csv", "compare.png"):
        assert (folder / name).stat().st_size > 100
    assert "one seed: nothing to say" in first.stdout
    before = (folder / "compare.csv").read_bytes()
    elsewhere = {**keys, "project": tmp_path / "elsewhere", "csv": folder / "compare.csv"}
    again = compare(elsewhere, method="none,native,dfd", amp="bf16")
    assert again.returncode == 0, again.stderr
    assert "4 runs, 4 of them in" in again.stdout
    assert (folder / "compare.csv").read_bytes() == before
    assert not list((tmp_path / "elsewhere").glob("*/weights"))
    alone = compare({"csv": folder / "compare.csv"})
    assert alone.returncode == 0, alone.stderr
    assert "native" in alone.stdout
    other = compare(elsewhere, method="dfd", amp="bf16", **{"dfd.gain": 1.0, "epochs": 1})
    assert "2 runs, 1 of them in" in other.stdout


def test_several_teachers_are_compared_by_the_strongest(keys: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    weak = save_checkpoint(random_detector("yolov8n.yaml", seed=8), tmp_path / "weak.pt")
    several = keys | {"teacher": f"[{weak},{teacher}]", "method": "native,dfmsd", "stages": "[1]"}
    done = compare(several)
    assert done.returncode == 0, done.stderr
    held = {row.method: row.teacher for row in read(tmp_path / "c" / "compare.csv").values()}
    name = Path(teacher).name
    assert held == {"native": name, "dfmsd": f"weak.pt {name}", "teacher": name}


def test_what_was_cut_off_goes_on(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"epochs": 40, "method": "none"}
    words = [f"{k}={v}" for k, v in keys.items()]
    command = [sys.executable, "-m", "yolokd.cli", "compare", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            results = list((tmp_path / "c").glob("none-*/results.csv"))
            if results and len(results[0].read_text().splitlines()) > 3:
                break
            time.sleep(0.05)
        process.kill()  # the comparison alone: the run's own process must end with it
    (run,) = (tmp_path / "c").glob("none-*")
    time.sleep(3)
    done = (run / "results.csv").read_text()
    assert len(done.splitlines()) < 40
    time.sleep(2)
    assert (run / "results.csv").read_text() == done
    found = compare(keys)
    assert found.returncode == 0, found.stderr
    (held,) = (r for r in read(tmp_path / "c" / "compare.csv").values() if r.method == "none")
    assert len(held.epochs) == 40
    assert "Resuming" in (run / "log.txt").read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "none,nope"}, "no method 'nope'"),
        ({"method": "none,none"}, "names a method twice"),
        ({"seeds": (0, 0)}, "seeds=(0, 0): must be different"),
        ({"name": "x"}, "name: is each run's own"),
        ({"pdf.gain": 1, "method": "none,dfd"}, "pdf.gain: sets a constant of no method here"),
        ({"split": "test"}, "split=test: is not in the data set"),
        ({"epochs": 0}, "epochs=0"),
        ({"teacher": "absent/t.pt", "method": "none,native"}, "teacher=absent/t.pt: no such file"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    keys: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        run_compare(**{"method": "none", **keys, **change})
    assert says in str(error.value)
    assert not (tmp_path / "c").exists()


def test_markdown_is_a_table() -> None:
    assert markdown([("a",) * 10], "t").count("|") == 3 * 11
