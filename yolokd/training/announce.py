"""What a run says of its teachers before the first step: to the log, and to the loggers that Ultralytics runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralytics.utils import LOGGER, SETTINGS
from ultralytics.utils.torch_utils import unwrap_model

from yolokd.errors import first_line
from yolokd.pyramid.level import level_name
from yolokd.training.plan import TrainPlan
from yolokd.training.results.provenance import flattened


def announce_teachers(trainer: Any) -> None:
    """Log what is paired with what, and give teachers, settings and versions to the loggers as parameters."""
    log_pairing(trainer.plan)
    record = unwrap_model(trainer.model).yolokd
    # Names of parameters are limited in MLflow, and names of classes are not.
    parameters = flattened({"yolokd": {**record, "classes_map": str(record["classes_map"])}})
    for name, log_parameters in LOGGERS.items():
        if SETTINGS[name] is True:
            try:
                log_parameters(trainer, parameters)
            except Exception as e:  # whatever a logger raises, as when its server is gone: no reason not to train
                LOGGER.warning(f"{name} did not take yolokd's settings: {first_line(e)}")


def log_pairing(plan: TrainPlan) -> None:
    """Log which levels and classes of each teacher are paired with the student's."""
    for paired in plan.teachers:
        name = f"distil from {paired.name}"
        for level in paired.pairing.levels:
            LOGGER.info(
                f"{name}, {level_name(level.stride)}: student {level.student_channels} channels, "
                f"teacher {level.teacher_channels}"
            )
        LOGGER.info(f"{name}, {paired.pairing.classes.describe(plan.names, paired.teacher.names)}")
    if plan.unlabelled:
        ratio = plan.config.unlabelled_ratio
        LOGGER.info(f"unlabelled images: {len(plan.unlabelled)}, of which a batch has {ratio:g} for each labelled one")


# The loggers are slow to import. When a setting of Ultralytics turns one on, Ultralytics has imported it already.


def _to_tensorboard(trainer: Any, parameters: Mapping[str, Any]) -> None:
    from torch.utils.tensorboard.summary import hparams
    from ultralytics.utils.callbacks import tensorboard

    score = trainer.plan.task.score_column("mAP50-95")
    if tensorboard.SummaryWriter and tensorboard.WRITER:
        for summary in hparams(parameters, {score: 0}):  # type: ignore[no-untyped-call]  # only the score's name is used, not the 0
            tensorboard.WRITER.file_writer.add_summary(summary)


def _to_mlflow(trainer: Any, parameters: Mapping[str, Any]) -> None:
    from ultralytics.utils.callbacks import mlflow

    if getattr(trainer, "_mlflow_active", False):
        mlflow.mlflow.log_params(parameters)


def _to_wandb(_trainer: Any, parameters: Mapping[str, Any]) -> None:
    from ultralytics.utils.callbacks import wb

    if wb.wb and wb.wb.run:
        wb.wb.run.config.update(parameters, allow_val_change=True)  # a resumed run may have other versions


LOGGERS = {"tensorboard": _to_tensorboard, "mlflow": _to_mlflow, "wandb": _to_wandb}  # by Ultralytics' setting
