"""The command line in a process of its own, forked off one that has imported everything: most of a start is imports."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
from pathlib import Path

from yolokd.cli import main

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["yolokd.commands.bench", "yolokd.exporter.export_model", "yolokd.commands.check"])


def forked(*words: str, cwd: Path, into: Path) -> subprocess.CompletedProcess[str]:
    """Run `yolokd WORDS` in cwd; what it says goes through files in another folder."""
    said = into / "out.txt", into / "err.txt"
    process = SERVER.Process(target=_main, args=(words, cwd, *said))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "still at work"
    return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in said))


def _main(words: tuple[str, ...], cwd: Path, *said: Path) -> None:
    for descriptor, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.chdir(cwd)
    os.environ["XDG_DATA_HOME"] = str(cwd / "share")
    main(words)
