"""Set-up of the teachers of a run: the precision that each runs in, the student's criterion, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import LOGGER

from yolokd.data.dataset import sample_batch
from yolokd.distillation.query_criterion import make_criterion
from yolokd.models.detector import Detector, dense_heads, head_of, rounded_imgsz
from yolokd.models.evaluate import VALIDATION_SETTINGS, check_teacher
from yolokd.models.teachers.backbone import Backbone
from yolokd.models.teachers.precision import choose_precision, name_of
from yolokd.pyramid.pairing import Pairing
from yolokd.runtime.distributed import IS_DISTRIBUTED, IS_MAIN, WORLD_SIZE, broadcast
from yolokd.runtime.threads import use_all_cores
from yolokd.training.plan import PairedTeacher, TrainPlan
from yolokd.training.results.provenance import provenance
from yolokd.training.resume.same_run import teacher_precisions
from yolokd.training.settings import images_per_batch

SCORING_SETTINGS = (*VALIDATION_SETTINGS, "device", "split", "classes")


def attach_criterion(trainer: Any) -> None:
    """Prepare the teachers of a trainer's plan, and give its student the criterion that learns from them."""
    use_all_cores(trainer.device)  # precisions are compared with the threads that the training will use
    plan: TrainPlan = trainer.plan
    images = sample_batch(trainer.data, rounded_imgsz(trainer.args.imgsz, plan.student)).to(trainer.device)
    precisions = teacher_precisions(trainer.saved_run, plan, trainer.device)
    batch = images_per_batch(plan.config, trainer.batch_size // WORLD_SIZE)
    trainer.plan = plan = replace(plan, teachers=optimize_teachers(plan, precisions, images, batch))
    trainer.model.yolokd = provenance(plan)
    pairs = [(paired.teacher, _with_live_head(paired.pairing, trainer.model)) for paired in plan.teachers]
    criterion = make_criterion(trainer.model, pairs, plan.config, trainer.args.seed)
    trainer.model.criterion = criterion.to(trainer.device)


def _with_live_head(pairing: Pairing, student: Detector) -> Pairing:
    """Return a pairing with the shapes of the student's head as it is now: weights that it loads may have changed them.

    Ultralytics builds a head whose hidden layers are as wide as those of the weights.
    """
    heads = dense_heads(head_of(student), pairing.student_strides)
    levels = (replace(level, student_head=heads[level.stride].shape if heads else None) for level in pairing.levels)
    return replace(pairing, levels=tuple(levels))


def optimize_teachers(
    plan: TrainPlan, precisions: Sequence[Any], images: Tensor, batch: int
) -> tuple[PairedTeacher, ...]:
    """Return the plan's teachers as the run will run them: moved to the device, in a fast and faithful precision.

    precisions: for each teacher one of `teacher_precision`'s values. images: (B, C, H, W) float32 in 0..1, on the
    device of the training. batch: images per batch of each process. All processes take the precision of the main one,
    because machines may differ.
    """
    pairs = list(zip(plan.teachers, precisions, strict=True))
    candidates = [_with_precision(plan, paired, precision, images, batch) for paired, precision in pairs]
    agreed = broadcast([_precision(candidate) for candidate in candidates])
    return tuple(
        candidate if _precision(candidate) == precision else _with_precision(plan, paired, precision, images, batch)
        for paired, candidate, precision in zip(plan.teachers, candidates, agreed, strict=True)
    )


def _precision(paired: PairedTeacher) -> str:
    return name_of(paired.teacher.settings.dtype)


def _with_precision(
    plan: TrainPlan, paired: PairedTeacher, precision: Any, images: Tensor, batch: int
) -> PairedTeacher:
    config = plan.config
    teacher, notes = choose_precision(
        paired.teacher.to(images.device), images, precision, config.teacher_imgsz, batch, config.teacher_compile
    )
    for note in notes if IS_MAIN else []:
        LOGGER.info(f"teacher {paired.name}: {note}")
    return replace(paired, teacher=teacher)


def score_teachers(plan: TrainPlan, args: Any, device: torch.device, batch: int, save_dir: Path) -> float | None:
    """Log the score of each teacher on the validation set; return mAP50-95 of the last one that detects.

    args: Ultralytics' settings of the training. batch: images per batch of the training. Ultralytics validates with
    twice as many, in float32. On GPUs that could need more memory than the training, so half precision and the plain
    batch are used there.
    """
    if IS_DISTRIBUTED:  # Ultralytics' validators gather over all processes, and only the main one is here
        LOGGER.info("teacher: its score is not measured in a run over several devices")
        return None
    on_gpu = {"batch": batch, "quantize": 16}
    settings = {key: getattr(args, key) for key in SCORING_SETTINGS}
    settings |= on_gpu if device.type == "cuda" else {"batch": batch * 2}
    try:
        scores = [
            check_teacher(
                paired.model,
                plan.task,
                plan.data,
                paired.pairing.classes,
                settings,
                save_dir,
                paired.teacher.image_channels,
            )
            for paired in plan.teachers
            if not isinstance(paired.model, Backbone)  # which detects nothing
        ]
    except torch.OutOfMemoryError:
        LOGGER.warning("teacher: the memory does not suffice to measure its score; check_teacher=False leaves that out")
        return None
    known = [score for score in scores if score is not None]
    if plan.config.teachers == "stages" and known != sorted(known):
        LOGGER.warning("teacher: a later teacher scores lower than an earlier one; name the weakest teacher first")
    return scores[-1] if scores else None
