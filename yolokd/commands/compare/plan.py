"""The plan of a comparison: its keys checked, its files resolved, its runs listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt

from yolokd.commands.candidates import NATIVE, PLAIN, setting_applies
from yolokd.commands.compare.identity import (
    ComparisonRun,
    SharedContent,
    ground_hash,
    read_shared_content,
    teacher_hashes,
    training_hash,
)
from yolokd.commands.compare.ledger import TEACHER
from yolokd.commands.native import check_native, check_same_levels
from yolokd.config.arguments import as_list
from yolokd.config.parse import check_keys
from yolokd.config.schema import DistillationConfig, normalize_teachers, teacher_files
from yolokd.config.ultralytics_keys import KNOWN_KEYS
from yolokd.config.validate import validate
from yolokd.data.dataset import data_file, split_images
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model, load_teacher
from yolokd.models.detector import Detector, check_detector
from yolokd.models.model_objects import as_paths
from yolokd.models.tasks import Task, scored_task
from yolokd.models.teachers.backbone import is_backbone, with_absolute_weights
from yolokd.pyramid.pairing import pair_classes
from yolokd.runtime.console import CONSOLE
from yolokd.training.plan import TrainPlan, check_data, make_plan
from yolokd.training.settings import training_keys

QUIET = {"plots": False, "verbose": False, "check_teacher": False}
COMPARISON_KEYS = frozenset({"seeds", "csv"})  # keys that only `compare` has
REFUSED_KEYS = dict.fromkeys(("save_dir", "name", "exist_ok", "resume", "cfg"), "drop it") | {
    "seed": "give seeds=0,1,2"
}
SPLITS = ("train", "val", "test")


def _refuse_duplicates(seeds: list[int]) -> list[int]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed is given twice")
    return seeds


Seeds = Annotated[
    list[NonNegativeInt], Field(min_length=1), BeforeValidator(as_list), AfterValidator(_refuse_duplicates)
]


@dataclass(frozen=True)
class Inputs:
    """A comparison's keys and teachers, loaded once.

    keys: of all methods together; `student`, `data` and `teacher` are names or paths of files. teachers: paths, weakest
    first. strongest: the last teacher's model; None if there is no teacher, or if it is a timm backbone.
    """

    keys: Mapping[str, Any]
    teachers: tuple[str, ...]
    strongest: Detector | None

    @property
    def classes_map(self) -> Mapping[str, str] | None:
        """Return the user's map of the teachers' classes, which the check of a training has validated."""
        return self.keys.get("classes_map")

    @property
    def teacher_channels(self) -> tuple[int, ...] | None:
        """Return which channels the teachers see, which the check of a training has validated."""
        given = self.keys.get("teacher_channels")
        return None if given is None else tuple(as_list(given))


@dataclass(frozen=True)
class Trainings:
    """The runs that train, and what they have in common.

    images: how many an epoch of training has. task: the student's. data: Ultralytics' dictionary of the data set.
    """

    runs: list[ComparisonRun]
    images: int
    task: Task
    data: Mapping[str, Any]
    content: SharedContent


def plan_runs(
    methods: Sequence[str], seeds: object, split: str, project: Path, keys: Mapping[str, Any]
) -> tuple[list[ComparisonRun], int]:
    """Return all runs, checked, and the number of images in an epoch; the run that scores the teacher comes first.

    seeds: one, or several in a list or a tuple. project: the folder for the runs' folders. keys: those of
    `yolokd train`. Trains nothing. Raises UserError, naming the first argument that cannot work.
    """
    _check_comparison_keys(keys)
    problem = "must be different whole numbers of at least 0"
    checked_seeds = validate("seeds", seeds, Seeds, problem, "for example seeds=0,1,2")
    if split not in SPLITS:
        raise UserError(f"split={split}", "is no split", f"one of: {', '.join(SPLITS)}")
    if keys.get("unlabelled") is not None:
        _check_unlabelled(methods)
    if keys.get("classes_map") is not None and {*methods} <= {PLAIN, NATIVE}:
        why = f"has no effect on method={','.join(methods)}"
        raise UserError("classes_map", why, "add a method, such as fitnet+pdf")
    inputs = _resolve_files(keys)
    if not inputs.teachers and {*methods} != {PLAIN}:
        or_drop = ", or drop native" if {*methods} <= {PLAIN, NATIVE} else ""
        raise UserError("teacher", "is missing", f"give teacher=yolov8l.pt, for example{or_drop}")
    if NATIVE in methods:
        if keys.get("teacher_channels") is not None:
            raise UserError("teacher_channels", "does not reach Ultralytics' own distillation", "drop native")
        check_native(inputs.keys["student"], inputs.teachers[-1:], bool(keys.get("trust")))
    trainings = _plan_trainings(inputs, methods, checked_seeds, split, project)
    if inputs.teachers and inputs.strongest is None:
        CONSOLE.print("teacher: is a timm backbone, which detects nothing: it is not scored")
    if not _can_score_teacher(inputs, trainings.task, trainings.data):
        return trainings.runs, trainings.images
    teacher_run = _plan_teacher(inputs, trainings, split, project)
    runs = [run if run.method == PLAIN else replace(run, teacher_row=teacher_run.hash) for run in trainings.runs]
    return [teacher_run, *runs], trainings.images


def _check_comparison_keys(keys: Mapping[str, Any]) -> None:
    """Raise UserError for an unknown key, and for one that the comparison sets itself for each run."""
    check_keys(keys, KNOWN_KEYS | COMPARISON_KEYS)
    for key in keys:
        if key in REFUSED_KEYS:
            raise UserError(key, "is set by compare for each run", REFUSED_KEYS[key])


def _check_unlabelled(methods: Sequence[str]) -> None:
    """Print which methods train without the images of `unlabelled=`. Raises UserError if all do."""
    without = [method for method in methods if method in (PLAIN, NATIVE)]
    if len(without) == len(methods):
        why = f"has no effect on method={','.join(without)}"
        raise UserError("unlabelled", why, "add a method, such as fitnet+pdf")
    if without:
        CONSOLE.print(f"unlabelled: method={','.join(without)} trains without these images")


def _resolve_files(keys: Mapping[str, Any]) -> Inputs:
    """Return the keys with the files that they name found, downloaded or written, and the teachers loaded."""
    resolved = training_keys({**keys, "teacher": normalize_teachers(as_paths(keys.get("teacher"), "teacher"))})
    resolved |= {"student": resolved.pop("model"), "data": data_file(resolved["data"])}
    trust = bool(resolved.get("trust"))
    # Download pretrained weights now: the hash of a run counts their content, and needs the path of their file.
    if isinstance(resolved.get("pretrained"), str | Path):
        resolved["pretrained"] = str(load_model(resolved["pretrained"], "pretrained", trust)[0].pt_path)
    files, strongest = [], None
    for file in teacher_files(resolved["teacher"]):
        strongest = None if is_backbone(file) else load_teacher(file, trust)
        if strongest is not None:
            check_detector(strongest, f"teacher={strongest.pt_path}")
        files.append(with_absolute_weights(file) if strongest is None else str(strongest.pt_path))
    resolved["teacher"] = normalize_teachers(files) if files else None
    return Inputs(resolved, tuple(files), strongest)


def _plan_trainings(
    inputs: Inputs, methods: Sequence[str], seeds: Sequence[int], split: str, project: Path
) -> Trainings:
    """Check each method and return the runs that train it, one a seed."""
    runs: list[ComparisonRun] = []
    strongest = inputs.teachers[-1] if inputs.strongest is not None else ""
    shared: dict[str, Any] = {
        "split": split,
        "project": project,
        "strongest_teacher": strongest,
        "classes_map": inputs.classes_map,
        "teacher_channels": inputs.teacher_channels,
    }
    content: SharedContent | None = None
    for method in methods:
        keys = _method_keys(inputs, method) | QUIET
        plan = _check_training(method, keys, split, inputs.strongest)
        if content is None:
            # Before files are hashed: the scan repairs some of them.
            images = check_data(plan)
            content = read_shared_content(inputs.keys, plan, split)
        keys |= reported_defaults(plan.config)
        shared |= {"config": training_hash(method, content, plan.config), "ground": ground_hash(content, split)}
        runs += [ComparisonRun(method=method, seed=seed, keys=keys, **shared) for seed in seeds]
    assert content is not None
    return Trainings(runs, images, plan.task, plan.data, content)


def _method_keys(inputs: Inputs, method: str) -> dict[str, Any]:
    """Return the keys that apply to a method; Ultralytics' own distillation has one teacher, the strongest."""
    also = {"trust"} if method == NATIVE else {"trust", "report"}
    keys = {k: v for k, v in inputs.keys.items() if setting_applies(k, method) or k in also} | {"method": method}
    return keys | {"teacher": inputs.teachers[-1]} if method == NATIVE else keys


def _check_training(method: str, keys: Mapping[str, Any], split: str, strongest: Detector | None) -> TrainPlan:
    """Return the checked plan of a method's trainings; raise UserError if they could not be trained or scored.

    strongest: the teacher of Ultralytics' own distillation.
    """
    # Ultralytics' own distillation is checked like plain training: both train in Ultralytics' trainer.
    plan = make_plan(training_keys({**keys, "method": PLAIN} if method == NATIVE else keys))
    if method == NATIVE and strongest is not None:
        check_same_levels(plan.student, strongest)
    _check_scorable(keys)
    if next(split_images(plan.data.get(split) or []), None) is None:
        raise UserError(f"split={split}", "is not in the data set", "give split=val, or a set that has it")
    return plan


def _check_scorable(keys: Mapping[str, Any]) -> None:
    """Raise UserError for settings that train, but whose scores would depend on the machine or not be comparable."""
    if keys.get("batch", 16) < 1:
        raise UserError(f"batch={keys['batch']}", "AutoBatch may differ from run to run", "for example batch=16")
    if keys.get("distill_model"):
        raise UserError("distill_model", "is what method=native is for", "use teacher=, and method=native")
    if keys.get("time"):
        raise UserError("time", "makes scores depend on how busy the machine is", "use epochs=")
    if keys.get("classes") is not None:
        raise UserError("classes", "does not reach the scores of a comparison", "give a data set of those classes")


def reported_defaults(config: DistillationConfig) -> dict[str, Any]:
    """Return settings that a row reports even if they are defaults, which may change in a later release."""
    schedules = {f"{method.name}.schedule": method.schedule.schedule for method in config.method_configs}
    common = {key: getattr(config, key) for key in ("balance", "level_weights", "level_floor", "adapter")}
    return common | schedules if schedules else {}


def _can_score_teacher(inputs: Inputs, task: Task, data: Mapping[str, Any]) -> bool:
    """Return whether the strongest teacher can be scored as the student is; print why not.

    task: the student's. data: Ultralytics' dictionary of the data set.
    """
    teacher = inputs.strongest
    if teacher is None:
        return False
    if pair_classes(teacher.names, data["names"], inputs.classes_map).objectness:
        CONSOLE.print("teacher: knows none of the data set's classes: it is not scored")
        return False
    if scored_task(teacher, task, data) is not task:
        CONSOLE.print(f"teacher: has no {task.score_name} on this data set, which decides here: it is not scored")
        return False
    return True


def _plan_teacher(inputs: Inputs, trainings: Trainings, split: str, project: Path) -> ComparisonRun:
    """Return the run that scores the strongest teacher."""
    keys = _method_keys(inputs, PLAIN) | {"method": TEACHER, "teacher": inputs.teachers[-1]}
    config, ground = teacher_hashes(inputs.keys, trainings.content, split, trainings.task.name)
    return ComparisonRun(
        method=TEACHER,
        seed=0,
        split=split,
        keys=keys,
        config=config,
        ground=ground,
        project=project,
        classes_map=inputs.classes_map,
        teacher_channels=inputs.teacher_channels,
    )
