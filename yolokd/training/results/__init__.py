"""What a finished run says of its student: a model card, a report, and a table in the log."""

from __future__ import annotations

from typing import Any

from yolokd.training.results.model_card import write_model_card
from yolokd.training.results.report import keep_beginning, write_run_report
from yolokd.training.results.summary import log_summary, teacher_sizes
from yolokd.training.resume.sidecar import drop_sidecars

__all__ = ["finish_run", "keep_beginning", "teacher_sizes"]


def finish_run(trainer: Any) -> None:
    """Write a run's card and report, remove its sidecar, since nothing is left to resume, and log the summary."""
    write_model_card(trainer)
    write_run_report(trainer)
    drop_sidecars(trainer.last)
    log_summary(trainer)
