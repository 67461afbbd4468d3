"""The command line, run in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from yolokd.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["yolokd.commands.bench", "yolokd.exporter.export_model", "yolokd.commands.check"])


def run_yolokd(*arguments: str, cwd: Path, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run `yolokd ARGUMENTS` in cwd, in a new Python process."""
    command = [sys.executable, "-m", "yolokd.cli", *arguments]
    environment = os.environ | {"COLUMNS": "200", "XDG_DATA_HOME": str(cwd / "share")}
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )


def run_forked(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `yolokd ARGUMENTS` in cwd, in a fork of a process that has made all imports, which take most of a start."""
    with TemporaryDirectory() as folder:
        outputs = Path(folder, "out.txt"), Path(folder, "err.txt")
        process = SERVER.Process(target=_main, args=(arguments, cwd, *outputs))
        process.start()
        process.join(300)
        assert process.exitcode is not None, "still running"
        return subprocess.CompletedProcess(
            arguments, process.exitcode, *(path.read_text(errors="backslashreplace") for path in outputs)
        )


def _main(arguments: tuple[str, ...], cwd: Path, *outputs: Path) -> None:
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    os.environ |= {"COLUMNS": "200", "XDG_DATA_HOME": str(cwd / "share")}
    main(arguments)
