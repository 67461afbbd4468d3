"""What a run says of its teachers before the first step: to the log, and to the loggers that Ultralytics runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.errors import first_line
from yolokd.pyramid.level import level_name
from yolokd.training.plan import TrainPlan
from yolokd.training.provenance import flattened
from yolokd.training.results.summary import SCORE


def announce_teachers(trainer: Any) -> None:
    """Log what is paired with what, and give teachers, settings and versions to the loggers as parameters."""
    log_pairing(trainer.plan)
    try:
        _log_parameters(trainer, flattened({"yolokd": unwrap_model(trainer.model).yolokd}))
    except Exception as e:  # whatever a logger raises, as when its server is gone: no reason not to train
        LOGGER.warning(f"a logger did not take yolokd's settings: {first_line(e)}")


def log_pairing(plan: TrainPlan) -> None:
    """Log which levels and classes of each teacher are paired with the student's."""
    for paired in plan.teachers:
        name = f"distil from {Path(paired.file).name}"
        for level in paired.pairing.levels:
            LOGGER.info(
                f"{name}, {level_name(level.stride)}: student {level.student_channels} channels, "
                f"teacher {level.teacher_channels}"
            )
        LOGGER.info(f"{name}, {paired.pairing.classes.describe(plan.data['names'], paired.teacher.names)}")
    if plan.unlabelled:
        ratio = plan.config.unlabelled_ratio
        LOGGER.info(f"unlabelled images: {len(plan.unlabelled)}, of which a batch has {ratio:g} for each labelled one")


def _log_parameters(trainer: Any, parameters: Mapping[str, Any]) -> None:
    """Give parameters to those of TensorBoard, MLflow and Weights & Biases that Ultralytics has started."""
    from ultralytics.utils.callbacks import mlflow, tensorboard, wb  # Ultralytics has imported them: they are slow

    if tensorboard.WRITER:
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(parameters, {SCORE: 0}):  # type: ignore[no-untyped-call]  # it heeds the name alone
            tensorboard.WRITER.file_writer.add_summary(summary)
    if getattr(trainer, "_mlflow_active", False):
        mlflow.mlflow.log_params(parameters)
    if wb.wb and wb.wb.run:
        wb.wb.run.config.update(parameters)
