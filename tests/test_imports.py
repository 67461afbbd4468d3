"""The architecture: imports between folders run one way, and modules and folders stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import yolokd

ROOT = Path(yolokd.__file__).parent
MODULES = {str(path.relative_to(ROOT)): path for path in sorted(ROOT.rglob("*.py"))}
MAX_LINES, MAX_MODULES = 300, 13

# What each folder, or module at the top, imports of the others. It may also import what those import.
IMPORTS = {
    "__main__": {"cli"},
    "cli": {"commands"},
    "commands": {"distiller"},
    "distiller": {"training", "exporter"},
    "training": {"distillation", "report", "models", "data"},
    "report": {"models", "data"},
    "distillation": {"models"},
    "exporter": {"models", "data"},
    "models": {"config", "data"},
    "config": {"methods", "runtime"},
    "methods": {"pyramid"},
    "pyramid": {"errors"},
    "data": {"patches"},
    "patches": {"runtime"},
    "runtime": {"errors", "version"},
    "errors": set(),
    "version": set(),
}


def room(name: str) -> str:
    """Return the folder, or the module at the top, of a path or a dotted name below yolokd."""
    return name.removesuffix(".py").replace("/", ".").split(".")[0]


def imported_rooms(path: Path) -> Iterator[str]:
    """Yield the room of each import of yolokd in a module, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names = [f"yolokd.{alias.name}" for alias in node.names] if node.module == "yolokd" else [str(node.module)]
        else:
            continue
        yield from (room(name.removeprefix("yolokd.")) for name in names if name.startswith("yolokd."))


def allowed(importer: str) -> set[str]:
    """Return all rooms that a room may import: itself, and those below it."""
    return {importer}.union(*(allowed(below) for below in IMPORTS[importer]))


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__init__.py"])
def test_imports_run_one_way(module: str) -> None:
    assert set(imported_rooms(MODULES[module])) <= allowed(room(module))


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in MODULES} - {"__init__"} == IMPORTS.keys()


def test_no_module_is_long() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_folder_holds_many_modules() -> None:
    folders = {path.parent for path in MODULES.values()}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    assert {name: count for name, count in counts.items() if count > MAX_MODULES} == {}


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys, yolokd.cli; print({'torch', 'ultralytics', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
