"""The plan of a run: everything is loaded, paired and checked before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from yolokd.config.arguments import did_you_mean
from yolokd.config.parse import check_keys, parse, split_keys
from yolokd.config.schema import DistillationConfig
from yolokd.config.ultralytics_keys import KNOWN_KEYS
from yolokd.data.dataset import check_images, learned_names, load_data
from yolokd.data.shape_labels import SHAPE_SETS
from yolokd.data.unlabelled import unlabelled_images
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model, load_student, load_teacher, student_task
from yolokd.models.detector import Detector, changing_strides, check_detector, dense_heads, head_of, rounded_imgsz
from yolokd.models.tasks import TASKS, Task, task_of
from yolokd.models.teachers.backbone import Backbone, backbone_teacher, is_backbone, load_backbone, teacher_name
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.models.teachers.teacher import Teacher
from yolokd.pyramid.head import HeadShape
from yolokd.pyramid.pairing import Pairing, choose_levels, pair_classes, pair_levels, unknown_names
from yolokd.runtime.files import sha256
from yolokd.training.compatibility import (
    check_distinct,
    check_finite,
    check_level_floor,
    check_methods,
    check_outputs,
    check_shapes,
    check_stages,
    check_student_without_scores,
    log_frozen_levels,
)
from yolokd.training.settings import check_settings


@dataclass(frozen=True)
class PairedTeacher:
    """One teacher, as loaded and as it will run, and its pairing with the student.

    sha256: of its file; of a timm backbone, of its weights. model: the whole detector, head included, or the backbone,
    until its score is measured; then None.
    """

    file: str
    sha256: str
    model: Detector | Backbone | None
    teacher: Teacher
    pairing: Pairing

    @property
    def name(self) -> str:
        """Return its name for people, without folders."""
        return teacher_name(self.file)


@dataclass(frozen=True)
class TrainPlan:
    """A checked run: configuration, data, Ultralytics' settings, student, and teachers, weakest first.

    With method=none there is no teacher. unlabelled: paths of the images without labels, once they are checked.
    """

    config: DistillationConfig
    data: dict[str, Any]
    args: Any  # Ultralytics' settings
    student: Detector
    teachers: tuple[PairedTeacher, ...]
    unlabelled: tuple[str, ...] = ()

    @property
    def task(self) -> Task:
        """Return the student's task."""
        return TASKS[self.args.task]

    @property
    def names(self) -> dict[int, str]:
        """Return the classes that the student learns."""
        return learned_names(self.data, self.args.classes)


def make_plan(keys: Mapping[str, Any]) -> TrainPlan:
    """Check a run given as one flat mapping of Ultralytics' and yolokd's keys (`model` is the student).

    Reads files, and downloads what Ultralytics can download; trains nothing and writes nothing.
    Raises UserError, naming the first argument that cannot work. `check_images` checks the images, separately.
    """
    check_keys(keys, KNOWN_KEYS)
    config = parse(keys)
    settings = split_keys(keys).ultralytics
    args = check_settings(settings, config)
    files = config.teacher_files if config.method_configs else ()
    for file in files:
        check_distinct(file, settings.get("model"))
    for key in ("pretrained", "distill_model"):
        if isinstance(settings.get(key), str | Path):
            load_model(settings[key], key, config.trust)
    models = {file: load_backbone(file) if is_backbone(file) else load_teacher(file, config.trust) for file in files}
    if settings.get("data") in SHAPE_SETS:  # else the student would be read once more
        check_shapes(settings["data"], TASKS[student_task(settings.get("model"), config.trust)])
    # Data after the teachers: the shapes are drawn on first use, which a refused teacher should not cost.
    data = load_data(settings.get("data"), bool(args.single_cls), trust=config.trust, split=args.split)
    student = load_student(settings.get("model"), data, config.trust)
    strides = check_detector(student, f"student={settings.get('model')}")
    args.task = _student_task(student, settings.get("task"))
    if files:
        check_stages(config, args)
        taught = [name for model in models.values() for name in model.names.values()]
        check_classes_map(config.classes_map or {}, taught, [*data["names"].values()])
    heads = {stride: head.shape for stride, head in dense_heads(head_of(student), strides).items()}
    if not heads:
        check_student_without_scores(f"student={settings.get('model')}", config)
    names = learned_names(data, args.classes)
    changing = changing_strides(student, strides, args.freeze)
    teachers = tuple(
        _pair_teacher(file, model, config, data, names, strides, heads, changing) for file, model in models.items()
    )
    if teachers:
        log_frozen_levels(config, [paired.pairing for paired in teachers], strides, changing)
        check_level_floor(config, [paired.teacher for paired in teachers])
    return TrainPlan(config, data, args, student, teachers)


def _pair_teacher(
    file: str,
    model: Detector | Backbone,
    config: DistillationConfig,
    data: Mapping[str, Any],
    names: Mapping[int, str],
    strides: Mapping[int, int],
    heads: Mapping[int, HeadShape],
    changing: Sequence[int],
) -> PairedTeacher:
    """Pair a teacher with the student.

    names: of the classes that the student learns. strides, heads: its channels and head at each stride. changing: the
    strides at which training changes its map.
    """
    if isinstance(model, Backbone):
        teacher = backbone_teacher(model, list(strides), config.levels)
    else:
        teacher = detector_teacher(model, f"teacher={file}")
    teacher = teacher.for_images(data["channels"], config.teacher_channels)
    check_outputs(file, teacher, config)
    check_finite(file, teacher, data)
    teacher_heads = {stride: head.shape for stride, head in teacher.heads.items()}
    levels = choose_levels(pair_levels(teacher.pyramid, strides, teacher_heads, heads), config.levels)
    levels = tuple(level for level in levels if level.stride in changing)
    if not levels:
        raise UserError("freeze", "leaves no feature map that a teacher could change", "freeze fewer layers")
    pairing = Pairing(levels, tuple(strides), pair_classes(teacher.names, names, config.classes_map))
    check_methods(config, levels)
    content = model.sha256 if isinstance(model, Backbone) else sha256(model.pt_path)
    return PairedTeacher(file, content, model, teacher, pairing)


def _student_task(student: Detector, given: object) -> str:
    """Return the name of a student's task. Raises UserError if another one is given."""
    task = task_of(student)
    assert task is not None
    if given not in (None, task.name):
        raise UserError(f"task={given}", f"is not that of the student: {task.name}", "drop task")
    return task.name


def check_classes_map(
    classes_map: Mapping[str, str], taught: Sequence[str], learned: Sequence[str], learner: str = "the data set"
) -> None:
    """Raise UserError for names in `classes_map` that are not among the teachers' classes, or not among the learned.

    learner: whose classes are learned.
    """
    for owner, asked, names in (("the teacher", classes_map, taught), (learner, classes_map.values(), learned)):
        if unknown := unknown_names(asked, names):
            problem = f"{owner} has no class {' or '.join(map(repr, unknown))}"
            hints = filter(None, (did_you_mean(name, names) for name in unknown))
            raise UserError("classes_map", problem, " ".join(hints) or f"its classes: {', '.join(list(names)[:10])}")


def check_data(plan: TrainPlan) -> int:
    """Check images and labels as `check_images` does, and return the number of training images.

    Raises UserError also if the last batch would be too small.
    """
    images = check_images(plan.data, plan.args, plan.config.trust)
    _check_last_batch(plan, images)
    return images


def with_unlabelled_images(plan: TrainPlan) -> TrainPlan:
    """Return the plan with the images of `unlabelled=`, if it is given, as `unlabelled_images` finds them."""
    config = plan.config
    if config.unlabelled is None:
        return plan
    return replace(plan, unlabelled=unlabelled_images(config.unlabelled, plan.data, plan.args, config.trust))


def _check_last_batch(plan: TrainPlan, images: int) -> None:
    """Raise UserError if a batch of one image would reach the coarsest level as one position: BatchNorm needs two.

    images: the number of training images.
    """
    args, stride = plan.args, max(map(int, plan.student.stride))
    grid = max(32, stride)  # multi_scale draws multiples of it
    smallest = max(int(rounded_imgsz(args.imgsz, plan.student) * (1 - args.multi_scale)) // grid * grid, grid)
    if smallest > stride or 1 not in (args.batch, images % max(int(args.batch), 1)):
        return
    problem = f"leaves one position of one image at stride {stride} in a batch, and BatchNorm needs two values"
    multi_scale = f" multi_scale={args.multi_scale}" if args.multi_scale else ""
    argument = f"imgsz={args.imgsz} batch={args.batch}{multi_scale}"
    raise UserError(argument, problem, "give another batch, or larger images")


def check_task(plan: TrainPlan, trained: str) -> None:
    """Raise UserError if a trainer's task is not the student's; the trainer was chosen by what the file's name says."""
    if plan.task.name != trained:
        problem = f"has the task {plan.task.name}, but its file's name says {trained}"
        raise UserError("student", problem, "download the file first, then give its path")
