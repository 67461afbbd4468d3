"""A training that kills itself with SIGKILL at a chosen operation: `killed.py OPERATION NUMBER KEYS-AS-JSON`."""

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
    global count
    count += operation == OPERATION
    if operation == OPERATION and count == NUMBER:
        os.kill(os.getpid(), signal.SIGKILL)


def watched(owner: Any, name: str, before: str = "", after: str = "") -> None:
    theirs: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        reached(before)
        result = theirs(*args, **kwargs)
        reached(after)
        return result

    setattr(owner, name, call)


watched(os, "fsync", "written", "synced")
watched(os, "replace", "renaming", "renamed")
watched(os, "unlink", "dropping")
watched(engine.BaseTrainer, "save_metrics", "row", "row written")
watched(engine, "strip_optimizer", "stripping", "stripped")
distiller = YoloDistiller()
distiller.add_callback("on_train_batch_end", lambda _: reached("batch"))
distiller.add_callback("on_train_epoch_end", lambda _: reached("epoch"))
distiller.add_callback(
    "on_train_start", lambda t: t.validator.add_callback("on_val_batch_end", lambda _: reached("val"))
)
distiller.train(**json.loads(sys.argv[3]))
