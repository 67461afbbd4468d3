"""`yolokd compare`: its statistics, its ledger, and real small comparisons."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from io import StringIO
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from helpers.data import write_dataset
from helpers.models import YOLOV8N, YOLOV8S, random_detector, save_checkpoint
from helpers.runs import TINY
from matplotlib.figure import Figure
from rich.console import Console
from scipy.stats import ttest_1samp
from ultralytics.utils import SETTINGS

from yolokd.commands.compare import run_compare
from yolokd.commands.compare.grounds import name_configurations
from yolokd.commands.compare.identity import ComparisonRun, fingerprint
from yolokd.commands.compare.ledger import OLD_COLUMNS, OLD_COLUMNS_WITH_D_PRED, VERSIONS, LedgerRow, append, read
from yolokd.commands.compare.plan import plan_runs
from yolokd.commands.compare.row import make_row
from yolokd.commands.compare.show import draw_plot, markdown, summary_cells, terminal_table
from yolokd.commands.compare.statistics import interval, ratio, summarize
from yolokd.commands.compare.verdicts import report
from yolokd.data.dataset import load_data
from yolokd.errors import UserError
from yolokd.runtime.files import sha256
from yolokd.runtime.lock import LOCK_FILE

TEACHER_ROW = "teacher's"


def row(method: str, seed: int, score: float, **changes: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "hash": f"{method}{seed}{changes}", "ground": "g", "teacher_row": TEACHER_ROW,
        "config": method + changes.get("settings", "") + changes.get("teacher", ""),
        "method": method, "seed": seed, "split": "val", "teacher": "t.pt",
        "student": "s.yaml", "data": "d.yaml", "settings": "epochs=2", "map": score, "map50": score,
        "ap_small": None, "ap_medium": 0.1, "ap_large": 0.2, "seconds": 1.0, "images_per_second": 2.0,
        "yolokd": "0", "ultralytics": "0", "torch": "0", "curve": "0.1 0.2",
    }  # fmt: skip
    return LedgerRow(**values | changes)


def teacher_row(score: float, **changes: Any) -> LedgerRow:
    """Return the row of a teacher's score."""
    return row("teacher", 0, score, **{"hash": TEACHER_ROW, "ground": "of the teacher", **changes})


def summaries(*rows: LedgerRow, teacher: float = 0.6) -> dict[str, Any]:
    return {s.method: s for s in summarize(rows, "none", "native", [teacher_row(teacher)])}


def test_the_interval_is_that_of_students_t_distribution() -> None:
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
    assert found.gap_closed.mean == pytest.approx(0.02 / (0.6 - 0.45))  # over the baseline's mean of those seeds


def test_a_method_is_compared_with_native() -> None:
    rows = [row("none", 0, 0.4), row("native", 0, 0.5), row("native", 1, 0.5), row("dfd", 0, 0.51), row("dfd", 1, 0.53)]
    found = summaries(*rows)
    assert found["dfd"].against_native.mean == pytest.approx(0.02)
    assert found["native"].against_native is None
    assert found["none"].against_native is None


def test_verdicts_follow_from_the_interval_of_the_difference() -> None:
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
    assert summaries(*base, row("elsewhere", 7, 0.9))["elsewhere"].verdict == "no common seed with the baseline"


def test_rows_with_other_settings_get_names_of_their_own() -> None:
    rows = [row("none", 0, 0.4), row("dfd", 0, 0.5, settings="epochs=2 balance=0.3"), row("dfd", 0, 0.6)]
    common, found = name_configurations(rows)
    assert common == "epochs=2 teacher=t.pt"
    assert [r.method for r in found] == ["none", "dfd balance=0.3", "dfd"]
    common, found = name_configurations(
        [rows[0], rows[1], row("pdf", 0, 0.5, settings="epochs=2 balance=0.3 pdf.box=1.0")]
    )
    assert common == "epochs=2 teacher=t.pt balance=0.3 pdf.box=1.0"
    assert [r.method for r in found] == ["none", "dfd", "pdf"]
    rows = [row(m, 0, 0.5, settings=f"epochs=2 {m}.schedule=cosine") for m in ("dfd", "pdf")]
    assert name_configurations(rows)[0] == "epochs=2 schedule=cosine teacher=t.pt"
    common, found = name_configurations([*rows, row("dfd", 0, 0.6, settings="epochs=2 dfd.schedule=linear")])
    assert common == "epochs=2 teacher=t.pt pdf.schedule=cosine"
    assert [r.method for r in found] == ["dfd dfd.schedule=cosine", "pdf", "dfd dfd.schedule=linear"]
    _, found = name_configurations(
        [row("none", 0, 0.4, teacher=""), row("dfd", 0, 0.5), row("dfd", 0, 0.6, teacher="w.pt t.pt")]
    )
    assert [r.method for r in found] == ["none", "dfd teacher=t.pt", "dfd teacher=w.pt,t.pt"]
    _, found = name_configurations(
        [row("none", 0, 0.4, teacher=""), row("native", 0, 0.5), row("native", 0, 0.6, teacher="u.pt")]
    )
    assert [r.method for r in found] == ["none", "native teacher=t.pt", "native teacher=u.pt"]


def test_rows_of_one_configuration_get_one_name() -> None:
    """A copied teacher file, or a default that was given: their seeds belong to one interval."""
    rows = [
        row("none", 0, 0.4, teacher=""),
        row("dfd", 0, 0.5, config="c", settings="epochs=2 probe=20"),
        row("dfd", 1, 0.5, config="c", teacher="copy.pt"),
        row("dfd", 1, 0.6, config="d", settings="epochs=2 probe=10"),
    ]
    assert [r.method for r in name_configurations(rows)[1]] == ["none", "dfd probe=20", "dfd probe=20", "dfd probe=10"]
    assert [r.method for r in name_configurations(rows[:3])[1]] == ["none", "dfd", "dfd"]


def shown(folder: Path, *rows: LedgerRow) -> dict[str, dict[str, dict[str, str]]]:
    """Return what `compare csv=FILE` writes for rows: {summary's file: {method: its line}}."""
    for r in rows:
        append(folder / "c.csv", r)
    run_compare(csv=str(folder / "c.csv"))
    return {path.name: table(path) for path in sorted(folder.glob("*-summary.csv"))}


def table(path: Path) -> dict[str, dict[str, str]]:
    """Return a summary's lines by method."""
    with open(path, encoding="utf-8") as file:
        return {line["method"]: line for line in csv.DictReader(file)}


def test_rows_of_different_grounds_are_not_compared(tmp_path: Path) -> None:
    """Scores on other images, or after another training, say nothing about a method."""
    rows = [
        row("none", s, 0.9, ground="h") for s in (0, 1)
    ]  # equal settings, but for example another data set of that name
    own = [row("none", s, 0.5) for s in (0, 1)] + [row("dfd", s, 0.49 + s / 500) for s in (0, 1)]
    found = shown(tmp_path, *own, *rows, teacher_row(0.6), teacher_row(0.7, hash="of a test split"))
    assert list(found) == ["c-2-summary.csv", "c-summary.csv"]
    first = found["c-summary.csv"]
    assert float(first["dfd"]["difference"]) == pytest.approx(-0.009)
    assert first["none"]["seeds"] == "2"
    assert [float(line["map"]) for name, line in first.items() if name.startswith("teacher")] == [0.6]
    assert {*found["c-2-summary.csv"]} == {"none", "teacher t.pt"}
    told = (tmp_path / "c-summary.md").read_text()
    assert "| -0.009 (" in told
    assert "| teacher t.pt |  | 0.600 |" in told
    assert (tmp_path / "c.png").stat().st_size > 100
    assert (tmp_path / "c-2.png").stat().st_size > 100


def test_two_configurations_of_one_method_are_not_averaged(tmp_path: Path) -> None:
    """For example after two releases with different defaults."""
    base = [row("none", s, 0.5) for s in range(4)]
    found = shown(tmp_path, *base, *(row("dfd", s, 0.6, config=("old" if s < 2 else "new")) for s in range(4)))
    assert {name: line["seeds"] for name, line in found["c-summary.csv"].items()} == {
        "none": "4",
        "dfd (old)": "2",
        "dfd (new)": "2",
    }


def test_each_method_is_compared_with_its_own_teacher(tmp_path: Path) -> None:
    """This holds whatever the files are called, and whichever teacher was scored last."""
    rows = [row("none", 0, 0.4, data="old.yaml"), row("dfd", 0, 0.5), row("dfd", 0, 0.5, config="u", teacher_row="u")]
    teachers = [teacher_row(0.6), teacher_row(0.8, hash="u"), teacher_row(0.9, hash="nobody's")]
    held = [row("none", 0, 0.9, ground="h"), *rows, *teachers]
    report(rows[:2], held, ["none", "dfd"], tmp_path / "c.csv")
    found = table(tmp_path / "c-2-summary.csv")
    assert [float(found[name]["share"]) for name in ("dfd (dfd)", "dfd (u)")] == pytest.approx([0.5, 0.25])
    assert float(found["dfd (u)"]["difference"]) == pytest.approx(0.1)
    assert "| +0.100 | 1 of 1 | 50% (no bounds) |" in (tmp_path / "c-2-summary.md").read_text()


def test_unregistered_methods_are_still_listed(tmp_path: Path) -> None:
    rows = row("dfd", 0, 0.4, settings="epochs=2 dfd.gain=2"), row("mine", 0, 0.5, settings="epochs=2 mine.power=3")
    found = shown(tmp_path, *rows)["c-summary.csv"]
    assert [name for name in found if not name.startswith("teacher")] == ["dfd", "mine"]


def test_rows_of_different_versions_give_a_warning(tmp_path: Path) -> None:
    shown(tmp_path, row("none", 0, 0.5, ultralytics="8.4.1"), row("dfd", 0, 0.6, ultralytics="8.4.2"))
    assert "different versions: ultralytics 8.4.1 and 8.4.2" in (tmp_path / "c-summary.md").read_text()


def test_the_plot_ranks_methods_and_shows_the_range_in_which_they_differ() -> None:
    """A method without the baseline's seeds has a curve and no bar."""
    late = "0 0.01 0.50 0.52"
    rows = [row("none", 0, 0.52, curve=late), row("frs", 0, 0.51, curve="0 0.3 0.49 0.51")]
    rows += [row("pdf", 0, 0.6, curve=late), row("dfd", 7, 0.9, curve=late)]
    teachers = [teacher_row(0.7)]
    figure = Figure()
    draw_plot(figure, summarize(rows, "none", None, teachers), teachers, "title")
    curves, bars = figure.axes
    figure.draw_without_rendering()
    assert [label.get_text() for label in bars.get_yticklabels()] == ["pdf\n(one seed)", "frs\n(one seed)"]
    assert bars.yaxis_inverted()
    assert curves.get_ylim()[0] == pytest.approx(0.49)
    assert curves.get_ylim()[1] > 0.7
    assert len({line.get_color() for line in curves.get_lines()[:4]}) == 4
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["none", "pdf\n(one seed)", "frs\n(one seed)", "dfd", "teacher t.pt"]


def test_the_interval_of_the_closed_gap_includes_the_noise_of_the_gap() -> None:
    """Fieller's interval holds the ratios R for which a paired t test of d - R g finds no effect (R is searched)."""
    rng, tried = np.random.default_rng(0), np.linspace(-1, 3, 4001)
    for _ in range(20):
        gaps = rng.normal(0.2, 0.02, 4)
        parts = 0.6 * gaps + rng.normal(0, 0.02, 4)
        found = ratio(list(parts), list(gaps))
        assert found.mean == pytest.approx(parts.mean() / gaps.mean())
        inside = tried[ttest_1samp(parts[:, None] - tried * gaps[:, None], 0).pvalue > 0.05]
        assert (found.low, found.high) == (pytest.approx(inside[0], abs=2e-3), pytest.approx(inside[-1], abs=2e-3))
        assert found.excludes_zero == interval(list(parts)).excludes_zero


def test_the_closed_gap_has_no_bounds_where_the_gap_may_be_zero() -> None:
    found = ratio([0.02, 0.021, 0.022], [0.03, -0.02, 0.01])
    assert (found.low, found.high) == (None, None)
    assert ratio([0.1], [0.2]).low is None


def test_without_a_gap_there_is_no_closed_gap() -> None:
    assert summaries(row("none", 0, 0.4), row("dfd", 0, 0.5), teacher=0.3)["dfd"].gap_closed is None


def test_rows_read_from_a_ledger_equal_those_written(tmp_path: Path) -> None:
    rows = [row("none", 0, 0.4), row("dfd+pdf", 1, 0.5, settings="a, b"), row("teacher", 0, 0.6, curve="", student="")]
    for r in rows:
        append(tmp_path / "new" / "c.csv", r)
    assert list(read(tmp_path / "new" / "c.csv").values()) == rows


@pytest.mark.parametrize("columns", [OLD_COLUMNS, OLD_COLUMNS_WITH_D_PRED], ids=["first", "with D_pred"])
def test_a_ledger_of_an_earlier_release_is_read_shown_as_then_and_appended_to(
    columns: list[str], tmp_path: Path
) -> None:
    path, rows = tmp_path / "c.csv", [row("none", 0, 0.4), row("dfd", 0, 0.5)]
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(r.model_dump() for r in rows)
    assert list(read(path).values()) == rows
    old = shown(tmp_path)["c-summary.csv"]
    assert not any("d_pred" in line or "box_map" in line for line in old.values())
    table = (tmp_path / "c-summary.md").read_text()
    assert "D_pred" not in table
    assert "box mAP" not in table
    new = row("dfd", 1, 0.6, d_pred=0.002, d_pred_teacher="abc")
    append(path, new)
    assert list(read(path).values()) == [*rows, new]


def test_d_pred_is_averaged_over_the_seeds_that_have_it(tmp_path: Path) -> None:
    with_teacher = {"d_pred_teacher": "abc"}
    rows = [row("dfd", seed, 0.5, d_pred=value, **with_teacher) for seed, value in enumerate((0.001, None, 0.004))]
    rows.append(row("none", 0, 0.4, d_pred=0.01, teacher="", **with_teacher))
    found = shown(tmp_path, *rows, teacher_row(0.6))["c-summary.csv"]
    assert {name: line["d_pred"] for name, line in found.items()} == {
        "dfd": "0.0025",
        "none": "0.01",
        "teacher t.pt": "",
    }
    lines = (tmp_path / "c-summary.md").read_text().splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["D_pred", "---", "2.50e-03", "1.00e-02", ""]


def test_plain_trainings_d_pred_is_not_shown_beside_those_of_another_teacher(tmp_path: Path) -> None:
    rows = [
        row("none", 0, 0.4, teacher="", d_pred=0.01, d_pred_teacher="abc"),
        row("dfd", 0, 0.5, d_pred=0.001, d_pred_teacher="abc"),
        row("dfd", 0, 0.5, config="u", d_pred=0.002, d_pred_teacher="def"),
    ]
    found = shown(tmp_path, *rows)["c-summary.csv"]
    assert [found[name]["d_pred"] for name in ("none", "dfd (dfd)", "dfd (u)")] == ["", "0.001", "0.002"]


def test_a_row_can_be_appended_after_a_missing_newline(tmp_path: Path) -> None:
    """Some editors remove the last newline."""
    path, rows = tmp_path / "c.csv", [row("none", 0, 0.4), row("dfd", 0, 0.5)]
    append(path, rows[0])
    path.write_text(path.read_text().rstrip())
    append(path, rows[1])
    assert list(read(path).values()) == rows


def test_a_ledger_without_a_training_is_refused(tmp_path: Path) -> None:
    append(tmp_path / "c.csv", row("teacher", 0, 0.5))
    with pytest.raises(UserError, match="holds no runs"):
        run_compare(csv=str(tmp_path / "c.csv"))


@pytest.mark.parametrize("keys", [{"method": "none"}, {"device": 0}, {"launcher": "ray"}], ids=str)
def test_showing_a_ledger_takes_no_keys_of_a_training(keys: dict[str, Any], tmp_path: Path) -> None:
    append(tmp_path / "c.csv", row("none", 0, 0.5))
    with pytest.raises(UserError, match=f"{next(iter(keys))}: has no effect: csv= alone trains nothing"):
        run_compare(csv=str(tmp_path / "c.csv"), **keys)


def test_a_row_with_too_many_cells_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    append(path, row("none", 0, 0.4))
    path.write_text(path.read_text().rstrip() + ",1\n")
    with pytest.raises(UserError, match="line 2 has more cells than there are columns"):
        read(path)


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "hash,method\nx", "\x00"])
def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.csv"
    path.write_text(content)
    with pytest.raises(UserError, match="no comparison's CSV"):
        run_compare(csv=str(path))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("map", "nan"),
        ("map50", "inf"),
        ("map", "7"),
        ("ap_small", "-inf"),
        ("seconds", "nan"),
        ("seed", "x"),
        ("images_per_second", "-1"),
        ("curve", "0.1 nan"),
        ("curve", "0.1 ?"),
        ("curve", "0.1,0.2"),
    ],
)
def test_a_number_that_is_none_in_a_ledger_is_named(tmp_path: Path, column: str, value: str) -> None:
    path = tmp_path / "c.csv"
    good = [row("none", seed, 0.5).model_dump() for seed in (0, 1)]
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, fieldnames=list(good[0]))
        writer.writeheader()
        writer.writerows([good[0], good[1] | {column: value}])
    with pytest.raises(UserError, match=f"is no comparison's CSV: line 3, column {column}: "):
        run_compare(csv=str(path))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["[/red]", "[bold]", "$\\frac{1}{$", "$x$ :smile:", "a|b"])
def test_names_appear_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Nothing in a name is read as markup, as an emoji, as a formula or as the border of a table."""
    rows = [row(method, seed, 0.5, student=name, curve="") for method in ("none", name) for seed in (0, 1)]
    shown(tmp_path, *rows, teacher_row(0.6, teacher=name))
    title, _, table_text = capsys.readouterr().out.partition("\n")
    assert title.startswith(f"{name} on d.yaml")
    assert f"│ {name} " in table_text
    assert f"│ teacher {name} " in table_text
    lines = (tmp_path / "c-summary.md").read_text().splitlines()[2:]
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
    assert (tmp_path / "c.png").stat().st_size > 100


def test_a_table_fits_a_narrow_terminal_and_cuts_off_no_number() -> None:
    rows = [row(method, seed, 0.5 + seed / 100) for method in ("none", "native", "fitnet+pdf") for seed in (0, 1)]
    lines = [summary_cells(s) for s in summarize(rows, "none", "native", [teacher_row(0.6)])]
    for width in (80, 100, 200):
        console = Console(width=width, file=StringIO())
        console.print(terminal_table(lines, width))
        text = console.file.getvalue()
        assert max(map(len, text.splitlines())) <= width
        for line in lines:
            assert {line[0], line[2], line[5]} <= {cell.strip() for cell in re.split("[│\n]", text)} | {""}
        assert ("not shown: " in text) == (width < 200)


def command(keys: dict[str, Any]) -> list[str]:
    return [sys.executable, "-m", "yolokd.cli", "compare", *(f"{k}={v}" for k, v in keys.items())]


@pytest.fixture
def keys(data: str, teacher: str, tmp_path: Path) -> dict[str, Any]:
    settings = {k: v for k, v in TINY.items() if k in ("imgsz", "batch", "nbs", "device", "report")}
    return {**settings, "data": data, "teacher": teacher, "epochs": 2, "project": tmp_path / "c", "seeds": 0}


def training(keys: dict[str, Any]) -> dict[str, Any]:
    """Return a comparison's keys without those that only `compare` has."""
    return {k: v for k, v in keys.items() if k not in ("method", "seeds", "project")}


def test_runs_in_the_ledger_are_not_run_again(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys |= {"method": "none,native,dfd"}
    two_at_once = command(keys | {"device": "cpu,cpu"})
    first = subprocess.run(two_at_once, capture_output=True, text=True, timeout=400)
    assert first.returncode == 0, first.stderr
    folder = tmp_path / "c"
    held = read(folder / "compare.csv")
    assert sorted(r.method for r in held.values()) == ["dfd", "native", "none", "teacher"]
    assert all(len(r.epochs) == 2 for r in held.values() if r.method != "teacher")
    assert all((r.d_pred is None) == (r.method == "teacher") for r in held.values())
    assert {r.d_pred_teacher for r in held.values()} == {"", sha256(keys["teacher"])[:12]}
    assert "D_pred" in (folder / "compare-summary.md").read_text()
    (told,) = (r.settings.split() for r in held.values() if r.method == "dfd")
    defaults = {"balance=1.0", "dfd.schedule=cosine", "level_weights=confidence", "level_floor=0.0", "adapter=conv"}
    assert defaults <= {*told}
    for name in ("compare-summary.md", "compare-summary.csv", "compare.png"):
        assert (folder / name).stat().st_size > 100
    assert "one seed: nothing to say" in first.stdout
    before = (folder / "compare.csv").read_bytes()
    run_compare(**keys | {"project": tmp_path / "elsewhere", "csv": folder / "compare.csv"})
    assert "4 runs, 4 of them in" in capsys.readouterr().out
    assert (folder / "compare.csv").read_bytes() == before
    assert not list((tmp_path / "elsewhere").glob("*/weights"))
    capsys.readouterr()
    whole = (folder / "compare-summary.md").read_text()
    run_compare(**keys | {"method": "dfd", "csv": folder / "compare.csv"})
    out = capsys.readouterr().out
    assert "2 runs, 2 of them in" in out
    assert "baseline" in out  # none, which the file holds
    assert "native" not in out.partition("compare-summary.md")[0].replace("against native", "")
    assert (folder / "compare-summary.md").read_text() == whole  # files tell of all that there is
    run_compare(csv=str(folder / "compare.csv"))
    assert "native" in capsys.readouterr().out
    other = training(keys) | {"dfd.gain": 1.0, "epochs": 1}
    assert [run.hash in held for run in plan_runs(["dfd"], 0, "val", tmp_path, other)[0]] == [True, False]


def test_of_several_teachers_the_strongest_is_scored_and_used_by_native(
    keys: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    weak = str(save_checkpoint(random_detector(YOLOV8N, seed=8), tmp_path / "weak.pt"))
    given = training(keys) | {"teacher": [weak, teacher], "stages": [1]}
    runs, _ = plan_runs(["native", "dfmsd"], 0, "val", tmp_path, given)
    assert {run.method: run.keys["teacher"] for run in runs} == {
        "teacher": teacher,
        "native": teacher,
        "dfmsd": (weak, teacher),
    }


def test_a_run_that_another_comparison_is_training_is_not_started(keys: dict[str, Any], tmp_path: Path) -> None:
    keys |= {"method": "none", "epochs": 1}
    run_compare(**keys)
    (run,) = (tmp_path / "c").glob("none-*")
    held = (tmp_path / "c" / "compare.csv").read_bytes()
    (tmp_path / "c" / "compare.csv").unlink()
    with (
        FileLock(run / LOCK_FILE),
        pytest.raises(RuntimeError, match="is running in another comparison"),
    ):
        run_compare(**keys)
    trained = (run / "weights" / "last.pt").stat().st_mtime_ns
    run_compare(**keys)
    assert (tmp_path / "c" / "compare.csv").read_bytes() == held
    assert (run / "weights" / "last.pt").stat().st_mtime_ns == trained


GOOD_SCORES = {"map": 0.2, "map50": 0.3, "ap_small": None, "ap_medium": 0.1, "ap_large": 0.2} | dict.fromkeys(
    VERSIONS, "1"
)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1]",
        "[" * 10**5,
        json.dumps(GOOD_SCORES | {"map": "__import__('os').getpid()"}),
        json.dumps(GOOD_SCORES | {"hash": "another"}),
        json.dumps({"map": 0.2}),
    ],
)
def test_a_file_that_holds_no_scores_is_named(text: str, tmp_path: Path) -> None:
    run = ComparisonRun(
        method="none", seed=0, split="val", keys={"student": "s.yaml", "data": "d.yaml"}, config="c", ground="g",
        project=tmp_path,
    )  # fmt: skip
    run.folder.mkdir()
    run.scores_path.write_text(json.dumps(GOOD_SCORES))
    assert make_row(run, images=12).map == 0.2
    run.scores_path.write_text(text)
    with pytest.raises(UserError, match=r"scores-val-g\.json holds no scores of a run"):
        make_row(run, images=12)


@pytest.mark.parametrize("name", ["{run}", "{run}/log.txt", "{run}/.train.lock", ".compare.csv.lock"])
def test_a_comparison_writes_through_no_link(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    run = plan_runs(["none"], 0, "val", keys["project"], training(keys))[0][-1]
    place, elsewhere = keys["project"] / name.format(run=run.folder.name), tmp_path / "elsewhere"
    elsewhere.mkdir()
    place.parent.mkdir(parents=True)
    place.symlink_to(elsewhere if name == "{run}" else elsewhere / "file")
    with pytest.raises(UserError, match=r"project=.* is a link, which could lead elsewhere"):
        run_compare(**keys | {"method": "none"})
    assert list(elsewhere.iterdir()) == []


def test_a_runs_hash_depends_on_the_content_of_its_files_not_on_their_paths(
    keys: dict[str, Any], tmp_path: Path
) -> None:
    def hashes(**changes: Any) -> list[str]:
        return [run.hash for run in plan_runs(["none"], 0, "val", tmp_path, training(keys) | changes)[0]]

    named, student = "own-yolov8n.yaml", tmp_path / "own-yolov8.yaml"  # as Ultralytics finds a scale's file
    content = random_detector(YOLOV8N, seed=0).yaml
    student.write_text(yaml.safe_dump({k: v for k, v in content.items() if k not in ("yaml_file", "scale")}))
    first = hashes(student=str(tmp_path / named))
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / student.name
    moved.write_bytes(student.read_bytes())
    assert hashes(student=str(moved.with_name(named))) == first
    student.write_text(student.read_text().replace("0.0625", "0.125"))
    assert hashes(student=str(tmp_path / named))[-1] != first[-1]
    by_name = hashes(student=YOLOV8N)
    assert by_name == hashes(student=YOLOV8N, device=None, workers=1, channels_last=True)
    assert by_name != hashes(student=YOLOV8S)


def test_a_runs_hash_depends_on_the_content_of_pretrained_weights(keys: dict[str, Any], tmp_path: Path) -> None:
    """Also if Ultralytics finds them by a bare name in its folder of downloads."""

    def hashes(pretrained: object) -> list[str]:
        runs, _ = plan_runs(["none"], 0, "val", tmp_path, training(keys) | {"pretrained": pretrained})
        return [run.hash for run in runs]

    downloads = Path(SETTINGS["weights_dir"])
    downloads.mkdir(parents=True, exist_ok=True)
    file = Path(save_checkpoint(random_detector(YOLOV8N, seed=3), tmp_path / "start.pt"))
    copy = Path(shutil.copy(file, downloads / "yolokd-test-start.pt"))
    try:
        assert hashes(copy.name) == hashes(str(file)) != hashes(False)
    finally:
        copy.unlink()
    with pytest.raises(UserError, match=r"pretrained=.*no such file"):
        hashes(str(tmp_path / "gone.pt"))


def test_unlabelled_images_count_by_their_content_and_for_methods_that_use_them(
    keys: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def runs(*methods: str, **changes: Any) -> list[ComparisonRun]:
        return plan_runs(methods, 0, "val", tmp_path, training(keys) | changes)[0][1:]

    photos = [tmp_path / name for name in ("a", "b")]
    for folder in photos:
        shutil.copytree(Path(write_dataset(tmp_path / "photos", train=14)).parent / "images" / "train", folder)
    without = runs("none", "native", "fitnet")
    taken = runs("none", "native", "fitnet", unlabelled=str(photos[0]))
    assert "method=none,native trains without these images" in capsys.readouterr().out
    assert [run.hash for run in taken][:2] == [run.hash for run in without][:2]
    assert "unlabelled" not in taken[0].keys | taken[1].keys
    assert taken[2].ground == without[2].ground  # so that it is compared with training on the labelled images alone
    assert taken[2].hash != without[2].hash
    assert runs("fitnet", unlabelled=str(photos[1]))[0].hash == taken[2].hash
    assert runs("fitnet", unlabelled=str(photos[1]), unlabelled_ratio=0.5)[0].hash != taken[2].hash
    (photos[1] / "13.jpg").unlink()
    assert runs("fitnet", unlabelled=str(photos[1]))[0].hash != taken[2].hash
    with pytest.raises(UserError, match="unlabelled: has no effect on method=none,native"):
        runs("none", "native", unlabelled=str(photos[0]))


def test_methods_share_a_ground_and_other_data_or_settings_give_another(keys: dict[str, Any], tmp_path: Path) -> None:
    def grounds(split: str = "val", **changes: Any) -> set[str]:
        runs = plan_runs(["none", "native", "dfd"], (0, 1), split, tmp_path, training(keys) | changes)[0]
        return {run.ground for run in runs if run.method != "teacher"}

    other_data = write_dataset(tmp_path / "other", train=13)
    changes: list[dict[str, Any]] = [{"split": "train"}, {"epochs": 3}, {"student": YOLOV8S}]
    found = [grounds(), *(grounds(**change) for change in changes), grounds(data=str(other_data))]
    assert [len(hashes) for hashes in found] == [1] * 5
    assert len(set.union(*found)) == 5
    assert grounds(balance=0.3, teacher=save_checkpoint(random_detector(YOLOV8N), tmp_path / "t.pt")) == found[0]


def test_adding_a_test_split_does_not_change_the_runs(keys: dict[str, Any], tmp_path: Path) -> None:
    card, own = Path(keys["data"]), tmp_path / "d.yaml"

    def runs(split: str, text: str) -> list[Any]:
        own.write_text(f"path: {card.parent}\n{text}")
        return plan_runs(["none", "dfd"], 0, split, tmp_path, training(keys) | {"data": str(own)})[0]

    before, after = (runs("val", card.read_text() + more) for more in ("", "\ntest: images/val\n"))
    assert [run.hash for run in before] == [run.hash for run in after]
    tested = runs("test", own.read_text())
    assert [run.folder for run in tested] == [run.folder for run in after]
    assert not {run.hash for run in tested} & {run.hash for run in after}
    assert not {run.scores_path for run in tested} & {run.scores_path for run in after}
    assert [run.teacher_row for run in tested] == ["", "", tested[0].hash]


def test_native_needs_equal_levels_and_all_channels(keys: dict[str, Any], tmp_path: Path) -> None:
    teacher = str(save_checkpoint(random_detector("yolov8n-p2.yaml"), tmp_path / "p2.pt"))
    with pytest.raises(UserError, match="method=native: needs equal strides"):
        plan_runs(["none", "native"], 0, "val", tmp_path, training(keys) | {"teacher": teacher})
    with pytest.raises(UserError, match="teacher_channels: does not reach"):
        plan_runs(["none", "native"], 0, "val", tmp_path, training(keys) | {"teacher_channels": [3, 2, 1]})


@pytest.mark.parametrize("line", ["channels: 1", "kpt_shape: [4, 2]", "flip_idx: [1, 0]"])
def test_a_data_set_that_is_read_in_another_way_gives_other_runs(
    line: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    card, own = Path(keys["data"]), tmp_path / "d.yaml"
    prints = []
    for more in ("", "channels: 3", line):
        own.write_text(f"path: {card.parent}\n{card.read_text()}\n{more}\n")
        prints.append(fingerprint(load_data(str(own)), "train"))
    assert prints[0] == prints[1] != prints[2]


def test_an_image_that_ultralytics_repairs_does_not_change_the_runs(keys: dict[str, Any], tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "own")
    image = next((data.parent / "images" / "train").glob("*.jpg"))
    image.write_bytes(image.read_bytes() + b"\0\0")  # its end marker is not at the end
    damaged = image.read_bytes()
    first, again = (plan_runs(["none"], 0, "val", tmp_path, training(keys) | {"data": str(data)})[0] for _ in range(2))
    assert image.read_bytes() != damaged
    assert [run.hash for run in first] == [run.hash for run in again]


def test_a_teacher_is_scored_on_what_it_shares_with_a_detector(keys: dict[str, Any], tmp_path: Path) -> None:
    """The boxes of a segmentation model are upright, those of the other one are not."""
    for name, scored in (("yolov8n-seg.yaml", ["teacher"]), ("yolov8n-obb.yaml", [])):
        teacher = save_checkpoint(random_detector(name, seed=1), tmp_path / f"{name}.pt")
        given = training(keys) | {"teacher": teacher}
        planned, _ = plan_runs(["none", "dfd"], 0, "val", tmp_path, given)
        assert [run.method for run in planned] == [*scored, "none", "dfd"]


EPOCHS = 12


def run_and_kill(keys: dict[str, Any]) -> str:
    """Kill a comparison after some epochs; return its run's results.csv, which must not grow afterwards."""
    folder, method = keys["project"], keys["method"]
    with subprocess.Popen(command(keys), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            results = list(folder.glob(f"{method}-*/results.csv"))
            if results and len(results[0].read_text().splitlines()) > 3:
                break
            time.sleep(0.05)
        process.kill()  # only the comparison: the run's own process must end by itself
    time.sleep(2)
    done = results[0].read_text()
    assert 3 < len(done.splitlines()) < EPOCHS
    time.sleep(2)
    assert results[0].read_text() == done
    return done


def resume_run(keys: dict[str, Any]) -> tuple[LedgerRow, str]:
    """Resume a comparison; return the row of its run, and what the run logs."""
    (run,) = keys["project"].glob(f"{keys['method']}-*")
    before = len((run / "log.txt").read_text())
    run_compare(**keys)
    (row,) = (r for r in read(keys["project"] / "compare.csv").values() if r.method == keys["method"])
    return row, (run / "log.txt").read_text()[before:]


@pytest.mark.slow
def test_a_killed_run_resumes_after_its_files_were_moved(
    keys: dict[str, Any], data: str, teacher: str, tmp_path: Path
) -> None:
    shutil.copytree(Path(data).parent, tmp_path / "d")
    shutil.copyfile(teacher, tmp_path / "t.pt")
    keys |= {"method": "fitnet", "epochs": EPOCHS, "data": tmp_path / "d" / "data.yaml", "teacher": tmp_path / "t.pt"}
    run_and_kill(keys)
    (tmp_path / "d").rename(tmp_path / "e")
    (tmp_path / "t.pt").rename(tmp_path / "u.pt")
    row, log = resume_run(keys | {"data": str(tmp_path / "e" / "data.yaml"), "teacher": str(tmp_path / "u.pt")})
    assert len(row.epochs) == EPOCHS
    assert "Resuming" in log


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.slow
def test_killed_native_runs_resume_from_every_state_of_their_files(keys: dict[str, Any], tmp_path: Path) -> None:
    """Ultralytics writes last.pt in place, then best.pt, and at the very end removes the teacher from both."""
    keys |= {"method": "native", "epochs": EPOCHS}
    done = run_and_kill(keys)
    copies = [tmp_path / name for name in ("best", "last", "end")]
    for copy in copies:
        shutil.copytree(tmp_path / "c", copy)
    shutil.rmtree(tmp_path / "c")
    weights = [next(copy.glob("native-*/weights")) for copy in copies]

    cut_in_half(weights[0] / "best.pt")
    row, log = resume_run(keys | {"project": copies[0]})
    assert len(row.epochs) == EPOCHS
    assert "Resuming" in log

    cut_in_half(weights[1] / "last.pt")
    row, log = resume_run(keys | {"project": copies[1]})
    assert len(row.epochs) == EPOCHS
    assert "Resuming" not in log

    checkpoint = torch.load(weights[2] / "last.pt", weights_only=False)
    torch.save(checkpoint | {"epoch": EPOCHS - 1}, weights[2] / "last.pt")
    row, _ = resume_run(keys | {"project": copies[2]})
    assert len(row.epochs) == len(done.splitlines()) - 1
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "none,nope"}, "no method 'nope'"),
        ({"method": "none,none"}, "names a method twice"),
        ({"seeds": (0, 0)}, "seeds=(0, 0): must be different"),
        ({"name": "x"}, "name: is set by compare for each run"),
        ({"pdf.gain": 1, "method": "none,dfd"}, "pdf.gain: sets a constant of no method here"),
        ({"split": "test"}, "split=test: is not in the data set"),
        ({"split": "names"}, "split=names: is no split (one of: train, val, test)"),
        ({"seed": 3}, "seed: is set by compare for each run (give seeds=0,1,2)"),
        ({"seeds": -1}, "seeds=-1: must be different whole numbers of at least 0"),
        ({"sedes": 3}, "sedes: unknown key (did you mean seeds?)"),
        ({"device": 7}, "device=7: "),
        ({"launcher": "rya"}, "launcher=rya: no such launcher (did you mean ray?)"),
        ({"launcher": "ray", "device": "0,1"}, "device=0,1: is not for launcher=ray, which gives each run a GPU"),
        ({"launcher": "ray", "cpus": 0}, "cpus=0: must be a whole number of at least 1"),
        ({"cpus": 2}, "cpus=2: is for launcher=ray"),
        ({"batch": -1}, "batch=-1: AutoBatch"),
        ({"time": 0.1}, "time: makes scores depend on how busy"),
        ({"classes": [0]}, "classes: does not reach"),
        ({"method": "none,natve"}, "native, or one of"),
        ({"method": "native", "teacher": None}, "teacher: is missing (give teacher=yolov8l.pt, for example, or drop"),
        ({"method": None, "teacher": None}, "teacher: is missing (give teacher=yolov8l.pt, for example)"),
        ({"epochs": 0}, "epochs=0"),
        ({"project": Path(__file__) / "c"}, "c: is not a writable folder"),
        ({"project": "a\0b"}, "is not a writable folder"),
        ({"project": "x" * 300}, "is not a writable folder"),
        ({"teacher": "absent/t.pt", "method": "none,native"}, "teacher=absent/t.pt: no such file"),
        ({"csv": Path(__file__) / "c.csv"}, "is not a writable folder"),
        ({"student": YOLOV8N, "model": YOLOV8N}, "student, model: name the same setting (give one of the two)"),
    ],
)
def test_invalid_settings_are_refused_before_anything_is_written(
    keys: dict[str, Any], tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError) as error:
        run_compare(**{"method": "none", **keys, **change})
    assert says in str(error.value)
    assert not (tmp_path / "c").exists()


def test_a_split_without_images_is_refused_before_anything_is_written(keys: dict[str, Any], tmp_path: Path) -> None:
    card, own = Path(keys["data"]), tmp_path / "d.yaml"
    own.write_text(f"path: {card.parent}\n{card.read_text()}\ntest: images/absent\n")
    with pytest.raises(UserError) as error:
        run_compare(**keys | {"method": "none", "split": "test", "data": str(own)})
    assert "split=test: is not in the data set" in str(error.value)
    assert not (tmp_path / "c").exists()


def test_markdown_has_a_cell_for_each_column() -> None:
    assert markdown([("a",) * 13], "t").count("|") == 3 * 14
