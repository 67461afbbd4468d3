"""The comparisons in runs/reference: their tables follow from their CSV files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from yolokd.commands.compare import run_compare

ROOT = Path(__file__).parents[1]
FOLDERS = [ROOT / "runs/reference/compare", ROOT / "runs/reference/tasks"]
LEDGERS = sorted(path for folder in FOLDERS for path in folder.glob("*.csv") if not path.stem.endswith("-summary"))


@pytest.mark.parametrize("ledger", LEDGERS, ids=lambda path: path.stem)
def test_committed_tables_equal_those_computed_from_the_csv(ledger: Path, tmp_path: Path) -> None:
    run_compare(csv=shutil.copy(ledger, tmp_path))
    written = sorted(tmp_path.glob("*-summary.*"))
    assert written
    for path in written:
        assert path.read_text() == ledger.with_name(path.name).read_text()
