"""The ledger's row of a finished run, from the files in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from yolokd.commands.compare.identity import FILES, SCORE_NEUTRAL_KEYS, ComparisonRun
from yolokd.commands.compare.ledger import TEACHER, LedgerRow
from yolokd.config.schema import teacher_files
from yolokd.errors import UserError
from yolokd.models.tasks import TASKS
from yolokd.models.teachers.backbone import teacher_name
from yolokd.report.history import read_history


def make_row(run: ComparisonRun, images: int) -> LedgerRow:
    """Return the ledger's row of a run whose scores are written. images: how many an epoch of training has.

    Raises UserError if the file with the scores is broken.
    """
    scores, history = _read_scores(run), read_history(run.folder)
    task = next((task for task in TASKS.values() if task.metric == scores.get("metric")), TASKS["detect"])
    curve, seconds = history.column(task.score_column("mAP50-95")), history.seconds
    keys = run.keys
    settings = {k: v for k, v in keys.items() if k not in FILES | SCORE_NEUTRAL_KEYS | {"method"}}
    if settings.get("unlabelled"):
        settings["unlabelled"] = Path(str(settings["unlabelled"])).name
    described: dict[str, Any] = {
        "hash": run.hash,
        "config": run.config,
        "ground": run.ground,
        "teacher_row": run.teacher_row,
        "method": run.method,
        "seed": run.seed,
        "split": run.split,
        "teacher": " ".join(teacher_name(file) for file in teacher_files(keys.get("teacher"))),
        "student": Path(str(keys["student"])).name if run.method != TEACHER else "",
        "data": Path(str(keys["data"])).name,
        "settings": " ".join(f"{k}={v}".replace(" ", "") for k, v in sorted(settings.items())),
        "seconds": round(seconds, 1),
        "images_per_second": round(images * len(curve) / seconds, 3) if seconds else 0.0,
        "curve": " ".join(f"{v:.4f}" for v in curve),
    }
    try:
        return LedgerRow(**scores, **described)
    except (TypeError, ValueError) as e:  # ValueError: also of pydantic
        raise _no_scores(run) from e


def _read_scores(run: ComparisonRun) -> dict[str, Any]:
    """Return the content of the file with a run's scores. Raises UserError if it is none."""
    try:
        return dict(json.loads(run.scores_path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, RecursionError) as e:  # ValueError: also of json
        raise _no_scores(run) from e


def _no_scores(run: ComparisonRun) -> UserError:
    problem = f"{run.scores_path} holds no scores of a run"
    return UserError(f"project={run.project}", problem, "remove this file, then the run is scored again")
