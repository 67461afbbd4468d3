"""What commands print and draw: names appear as they are, and tables fit the terminal."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from yolokd import UserError
from yolokd.exporter.parity import ExportReport, print_report
from yolokd.runtime.console import fit_table, make_console, make_progress
from yolokd.runtime.plots import new_plot

NAMES = ["[/red]", "[bold]x[/bold]", "a :smile: b"]


@pytest.mark.parametrize("name", NAMES)
def test_a_progress_bar_shows_names_as_they_are(name: str) -> None:
    progress, console = make_progress(), make_console(width=100)
    progress.add_task(name, total=1)
    with console.capture() as captured:
        console.print(progress.get_renderable())
    assert name in captured.get()


@pytest.mark.parametrize("name", ["[red]x", "a :smile: b"])
def test_the_table_of_an_export_shows_names_as_they_are(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_report(ExportReport(path=Path(f"{name}.onnx")))
    assert f"{name}.onnx" in capsys.readouterr().out


@pytest.mark.parametrize("name", [r"$\frac{1}{$", "$x$", r"\$", *NAMES])
def test_a_plot_shows_names_as_they_are(name: str, tmp_path: Path) -> None:
    with new_plot(tmp_path / "a.png") as figure:
        axes = figure.subplots()
        axes.plot([0, 1], label=name)
        axes.set_yticks([0, 1], [name, name])
        legend = figure.legend(loc="outside lower center")
        texts = [figure.suptitle(name), *axes.get_yticklabels(), *legend.get_texts()]
    assert all(text.get_text() == name and not text.get_parse_math() for text in texts)
    assert (tmp_path / "a.png").stat().st_size > 100


def test_a_plot_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    with pytest.raises(UserError, match="cannot be written"), new_plot(tmp_path / "a.png"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


WORDS = st.text(string.ascii_letters + "漢", min_size=1, max_size=12)


@given(st.lists(st.tuples(WORDS, WORDS, WORDS), min_size=1, max_size=3), st.integers(60, 120))
def test_a_table_leaves_columns_out_but_cuts_no_cell(lines: list[tuple[str, str, str]], width: int) -> None:
    table = fit_table(("name", "value", "more"), lines, width, ("more",), ("name",), "see the file")
    console = make_console(width=width)
    with console.capture() as captured:
        console.print(table)
    text = captured.get()
    assert all(name in text and value in text for name, value, _ in lines)
    assert ("see the file" in text) == (len(table.columns) == 2)
