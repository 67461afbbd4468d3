"""A training that kills itself at a chosen moment: `killed_training.py OPERATION NUMBER SETTINGS-AS-JSON`.

It sends itself SIGKILL at the NUMBERth time that OPERATION happens: one of the names in the calls below, or `never`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from ultralytics.engine import trainer as engine

from yolokd import YoloDistiller

OPERATION, NUMBER = sys.argv[1], int(sys.argv[2])
count = 0


def reached(operation: str) -> None:
    """Count an operation; kill this process if it is the chosen one."""
    global count
    count += operation == OPERATION
    if operation == OPERATION and count == NUMBER:
        os.kill(os.getpid(), signal.SIGKILL)


def watch(owner: Any, name: str, before: str = "", after: str = "") -> None:
    """Make calls of `owner.name` count as the operation `before` when they begin, and `after` when they end."""
    original: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        reached(before)
        result = original(*args, **kwargs)
        reached(after)
        return result

    setattr(owner, name, call)


watch(os, "fsync", "written", "synced")
watch(os, "replace", "renaming", "renamed")
watch(os, "unlink", "dropping")
watch(engine.BaseTrainer, "save_metrics", "row", "row written")
watch(engine, "strip_optimizer", "stripping", "stripped")
distiller = YoloDistiller()
distiller.add_callback("on_train_batch_end", lambda _: reached("batch"))
distiller.add_callback("on_train_epoch_end", lambda _: reached("epoch"))
distiller.add_callback(
    "on_train_start", lambda t: t.validator.add_callback("on_val_batch_end", lambda _: reached("val"))
)
distiller.train(**json.loads(sys.argv[3]))
