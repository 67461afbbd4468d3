"""The models beside which an export is shown: the teacher, and a baseline that had none."""

from __future__ import annotations

from pathlib import Path

from yolokd.commands.deploy.ledger import BASELINE, TEACHER
from yolokd.commands.deploy.settings import DeploySettings
from yolokd.config.arguments import as_list
from yolokd.models.checkpoint import load_model, load_teacher
from yolokd.models.detector import Detector
from yolokd.models.origin import origin_of
from yolokd.models.teachers.backbone import is_backbone
from yolokd.runtime.console import CONSOLE
from yolokd.runtime.files import read_yaml, sha256


def find_references(settings: DeploySettings, module: Detector, run: Path) -> list[tuple[str, Path]]:
    """Return the role and the checkpoint of each model to compare with.

    If the user names no teacher, it is the one that the run's distill.yaml names, as long as it is the same file as in
    the training. Raises UserError for a checkpoint that cannot be loaded.
    """
    teachers = settings.teacher or _teachers_of_run(module, run)
    found = [(TEACHER, load_teacher(teacher, settings.trust)) for teacher in teachers]
    if settings.baseline:
        found.append((BASELINE, load_model(settings.baseline, "baseline", settings.trust)[0]))
    return [(role, Path(model.pt_path)) for role, model in found]


def _teachers_of_run(module: Detector, run: Path) -> list[str]:
    hashes = {teacher.sha256 for teacher in origin_of(module).teachers}
    if not hashes:
        return []
    named = [str(file) for file in as_list(read_yaml(run / "distill.yaml").get("teacher") or [])]
    found = [file for file in named if not is_backbone(file) and Path(file).is_file() and sha256(file) in hashes]
    if any(map(is_backbone, named)):
        CONSOLE.print("a teacher is a backbone, which detects nothing, and is not measured")
    elif len(found) < len(hashes):
        CONSOLE.print("the teacher is not where the run found it, and is not measured; teacher= can name it")
    return found
