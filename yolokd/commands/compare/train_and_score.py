"""Training and scoring of one run, inside the run's process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any
from zipfile import is_zipfile

from yolokd.commands.candidates import NATIVE
from yolokd.commands.compare.identity import ComparisonRun, digest
from yolokd.commands.compare.ledger import TEACHER
from yolokd.config.parse import split_keys
from yolokd.data.dataset import load_data
from yolokd.distiller import YoloDistiller
from yolokd.models.checkpoint import load_model, load_teacher, student_task
from yolokd.models.detector import Detector
from yolokd.models.disagreement import mean_disagreement
from yolokd.models.evaluate import VALIDATION_SETTINGS, copy_for_data, score
from yolokd.models.origin import versions
from yolokd.models.tasks import TASKS, Task
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.training_loop import bfloat16_on_cpu
from yolokd.pyramid.pairing import pair_classes
from yolokd.runtime.files import atomic_path, sha256
from yolokd.training.resume.sidecar import is_trained, saved_epoch


def train_and_score(run: ComparisonRun, device: object) -> None:
    """Train a run as far as it is not trained, and write its scores to `run.scores_path`.

    A teacher's run is only scored.
    """
    with bfloat16_on_cpu(), safe_loading(run.trusts_files):
        task = TASKS[student_task(run.keys["student"], run.trusts_files)]
        if run.method == TEACHER:
            model = _aligned_teacher(run, task)
        else:
            _finish_training(run, device, task)
            model = _trained_model(run)
        settings = {key: run.keys[key] for key in VALIDATION_SETTINGS if key in run.keys}
        settings |= {"batch": 2 * run.keys.get("batch", 16), "device": device, "split": run.split, "save_json": True}
        scores = asdict(score(model, settings, run.folder, task)) | _disagreement(run, model, settings)
    with atomic_path(run.scores_path) as path:
        path.write_text(json.dumps({**scores, **versions()}), encoding="utf-8")


def _disagreement(run: ComparisonRun, student: Detector, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ledger's columns on how much a student disagrees with the comparison's strongest teacher."""
    if not run.strongest_teacher:
        return {}
    teacher = load_teacher(run.strongest_teacher, run.trusts_files)
    value = mean_disagreement(teacher, student, settings, run.folder, run.classes_map, run.teacher_channels)
    identity = sha256(run.strongest_teacher)
    if run.classes_map is not None:  # which classes are compared depends on it
        identity = digest([identity, run.classes_map])
    if run.teacher_channels is not None:
        identity = digest([identity, list(run.teacher_channels)])
    return {} if value is None else {"d_pred": value, "d_pred_teacher": identity[:12]}


def _aligned_teacher(run: ComparisonRun, task: Task) -> Detector:
    """Return the teacher, its classes mapped to those of the data set."""
    model = load_teacher(run.keys["teacher"], run.trusts_files)
    data = load_data(run.keys["data"], bool(run.keys.get("single_cls")), trust=run.trusts_files)
    mapping = pair_classes(model.names, data["names"], run.classes_map).mapping
    return copy_for_data(model, data, task, mapping, run.teacher_channels)


def _finish_training(run: ComparisonRun, device: object, task: Task) -> None:
    """Train a run from its start or from its last checkpoint; do nothing if its training is complete.

    task: the student's.
    """
    if run.method == NATIVE:
        _repair_half_written(run)
    if _is_trained(run):
        return
    if run.method == NATIVE:
        _train_native(run, device, task)
    else:
        _train(run, device)


def _trained_model(run: ComparisonRun) -> Detector:
    """Return the best checkpoint's model; the last one's if there is no best."""
    best = run.weights / "best.pt"
    model = load_model(best if best.exists() else run.weights / "last.pt", "model")[0]
    # Ultralytics removes its teacher only at the very end: a run that was killed just before still holds it.
    student: Detector = getattr(model, "student_model", model)
    return student


def _repair_half_written(run: ComparisonRun) -> None:
    """Remove or replace a checkpoint of Ultralytics that is cut off.

    Ultralytics writes last.pt in place, then the same content as best.pt; a kill may leave half of either. A cut-off
    last.pt is removed, and training starts anew; a cut-off best.pt is replaced by last.pt.
    """
    last, best = (run.weights / name for name in ("last.pt", "best.pt"))
    if last.exists() and not is_zipfile(last):
        last.unlink()
    elif last.exists() and best.exists() and not is_zipfile(best):
        with atomic_path(best) as path:
            shutil.copyfile(last, path)


def _is_trained(run: ComparisonRun) -> bool:
    """Return whether a run's training is complete, by its last checkpoint."""
    last = run.weights / "last.pt"
    if run.method != NATIVE or not last.exists():
        return is_trained(last)
    epoch = saved_epoch(last)
    return epoch < 0 or epoch + 1 >= run.epochs  # Ultralytics cannot resume if the final evaluation alone is missing


def _train(run: ComparisonRun, device: object) -> None:
    """Train, or resume, plain training or a method."""
    if not (run.weights / "last.pt").exists():
        YoloDistiller().train(**{**run.keys, "save_dir": str(run.folder), "seed": run.seed, "device": device})
        return
    may_have_moved = ("teacher", "data", "unlabelled")
    moved = {key: run.keys[key] for key in may_have_moved if key in run.keys}
    YoloDistiller().train(resume=str(run.folder), trust=run.trusts_files, device=device, **moved)


def _train_native(run: ComparisonRun, device: object, task: Task) -> None:
    """Train, or resume, Ultralytics' own distillation."""
    last = run.weights / "last.pt"
    if last.exists():
        settings: dict[str, Any] = {"model": str(last), "resume": str(last)}
    else:
        settings = split_keys(run.keys).ultralytics
        settings["model"] = settings.pop("student")
    # A resume needs these as well: a checkpoint names files where they were, and they may have moved since.
    settings |= {"distill_model": run.keys["teacher"], "data": run.keys["data"]}
    settings |= {"save_dir": str(run.folder), "seed": run.seed, "device": device}
    task.trainer(overrides=settings).train()
