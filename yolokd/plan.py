"""What a run will do, known (and refused, if it must be) before anything is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg, get_save_dir
from ultralytics.nn.modules.head import Detect
from ultralytics.nn.tasks import DetectionModel, guess_model_task
from ultralytics.utils import DEFAULT_CFG_DICT
from ultralytics.utils.checks import check_imgsz
from ultralytics.utils.torch_utils import parse_device, select_device

from yolokd.checkpoint import check_path, load_model
from yolokd.config import Distillation, check_keys, defaults, is_own, parse
from yolokd.data import load_data
from yolokd.errors import UserError, first_line
from yolokd.files import sha256
from yolokd.methods import registered
from yolokd.pyramid import Detector, Pairing, pair_classes, pair_levels, read_pyramid
from yolokd.ranks import PROCESSES
from yolokd.teacher import PROMPTED, Teacher, check_detector

OPTIMIZERS = ("auto", "sgd", "musgd", "adam", "adamax", "adamw", "nadam", "radam", "rmsprop")  # Ultralytics' own
# What Ultralytics still takes, with a warning, under an old name or without effect.
DEPRECATED = frozenset(
    {"half", "int8", "end2end", "boxes", "hide_labels", "hide_conf", "line_thickness"}
    | {"label_smoothing", "save_hybrid", "crop_fraction", "keras"}
)
KNOWN_KEYS = frozenset(DEFAULT_CFG_DICT) | DEPRECATED | {"augmentations", "save_dir"}


@dataclass(frozen=True)
class Lesson:
    """One teacher, as loaded and as it will run, and how the student fits it."""

    file: str
    sha256: str
    model: Detector | None  # head included: what `check_teacher` scores; then dropped
    teacher: Teacher
    pairing: Pairing


@dataclass(frozen=True)
class Plan:
    """A checked run: its configuration and, unless method=none, its teachers, weakest first."""

    config: Distillation
    data: dict[str, Any]
    args: Any  # Ultralytics' settings
    student: Detector
    lessons: tuple[Lesson, ...]


def make_plan(keys: Mapping[str, Any]) -> Plan:
    """Check a run given as one flat mapping of Ultralytics' and yolokd's keys (`model` is the student).

    Reads files, may download what Ultralytics can download, trains nothing and writes nothing.
    Raises UserError naming the first argument that cannot work; its images are left to `check_images`.
    """
    check_keys(keys, KNOWN_KEYS)
    config = parse(keys)
    settings = {k: v for k, v in keys.items() if not is_own(k)}
    args = _check_settings(settings, config)
    files = config.teachers if config.parts else ()
    for file in files:
        _check_distinct(file, settings.get("model"))
    models = {file: load_teacher(file, config.trust) for file in files}
    # After the teachers: the embedded set is made on first use.
    data = load_data(settings.get("data"), bool(args.single_cls), trust=config.trust, split=args.split)
    student = load_student(settings.get("model"), data, config.trust)
    if files:
        _check_stages(config, args.epochs)
    lessons = tuple(_lesson(file, model, config, data, read_pyramid(student)) for file, model in models.items())
    return Plan(config, data, args, student, lessons)


def _lesson(
    file: str, model: Detector, config: Distillation, data: Mapping[str, Any], strides: Mapping[int, int]
) -> Lesson:
    teacher = Teacher(model)
    _check_fit(file, teacher, config, data)
    pairing = Pairing(
        tuple(pair_levels(teacher.pyramid, strides)), tuple(strides), pair_classes(teacher.names, data["names"])
    )
    return Lesson(file, sha256(model.pt_path), model, teacher, pairing)


def _check_stages(config: Distillation, epochs: int) -> None:
    if config.starts(epochs)[-1] >= epochs:
        raise UserError(
            f"stages={list(config.stages or ())}",
            f"leaves no epoch of {epochs} to the last teacher",
            "begin it earlier",
        )


def training_keys(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a new run, defaults filled in: the student becomes Ultralytics' `model`."""
    student = keys.get("student") or keys.get("model") or defaults()["student"]
    rest = {k: v for k, v in keys.items() if k not in {"student", "model"}}
    return {"data": defaults()["data"]} | rest | {"model": str(student) if isinstance(student, Path) else student}


def training_imgsz(imgsz: object, plan: Plan) -> int:
    """The image size in pixels that Ultralytics will train at: a multiple of the student's largest stride."""
    largest = max([32, *map(int, plan.student.stride)])
    return int(check_imgsz(imgsz, stride=largest, floor=largest, max_dim=1))


def load_teacher(path: str | None, trust: bool) -> Detector:
    """The teacher's model, from a .pt checkpoint; `UserError` where it is none."""
    if not str(path).endswith(".pt"):
        raise UserError(f"teacher={path}", "is no .pt checkpoint", "give a trained model, for example yolov8l.pt")
    model, _ = load_model(str(path), "teacher", trust)
    check_detector(model, f"teacher={path}")
    return model


def load_student(path: object, data: Mapping[str, Any], trust: bool) -> Detector:
    """The student's model, from a .yaml (random weights) or a .pt; `UserError` where it is no plain YOLO detector."""
    name = f"student={path}"
    if str(path).endswith((".yaml", ".yml")):
        try:
            model: Detector = DetectionModel(str(path), nc=data["nc"], ch=data["channels"], verbose=False)
        except FileNotFoundError as e:
            raise UserError(name, "no such file", "give a model's .yaml, for example yolov8n.yaml, or a .pt") from e
        except Exception as e:
            raise UserError(name, "does not describe a YOLO detector", "for example yolov8n.yaml") from e
    elif str(path).endswith(".pt"):
        model, _ = load_model(str(path), "student", trust)
    else:
        raise UserError(name, "is neither .yaml nor .pt", "for example yolov8n.yaml or yolov8n.pt")
    check_detector(model, name)
    task = guess_model_task(model)
    if task != "detect" or not isinstance(model.model[-1], Detect) or isinstance(model.model[-1], PROMPTED):
        raise UserError(
            name,
            f"is no plain YOLO detector ({type(model.model[-1]).__name__}, task {task})",
            "give a YOLO detection model",
        )
    return model


def check_device(device: object) -> str:
    """Ultralytics' name of a device; `UserError` where there is none such here."""
    try:
        found = parse_device("" if device is None else device)
        select_device(found, verbose=False)
    except (TypeError, ValueError, SyntaxError, AssertionError) as e:
        raise UserError(f"device={device}", first_line(e), "give one that is here, for example device=cpu") from e
    return str(found)


def _check_settings(settings: Mapping[str, Any], config: Distillation) -> Any:
    """Ultralytics' settings; what it would refuse too late is refused, and what does not go with a teacher."""
    try:
        args = get_cfg(overrides={k: v for k, v in settings.items() if k != "model"})
        args.imgsz = check_imgsz(args.imgsz, max_dim=1)  # of several, as [640, 480], the largest
    except (TypeError, ValueError, SyntaxError, AssertionError) as e:
        raise UserError("settings", first_line(e), "see Ultralytics' train settings") from e
    devices = check_device(args.device)
    if not isinstance(args.epochs, int) or args.epochs < 1:
        raise UserError(f"epochs={args.epochs}", "must be a whole number of at least 1", "for example epochs=100")
    check_path(get_save_dir(args), "project")
    processes = max(PROCESSES, len(devices.split(",")))
    if processes > 1 and args.batch < processes:
        raise UserError(f"batch={args.batch}", f"leaves nothing to some of {processes} devices", "give a larger one")
    if str(args.optimizer).lower() not in OPTIMIZERS:
        raise UserError(f"optimizer={args.optimizer}", "no such optimizer", f"one of: {', '.join(OPTIMIZERS)}")
    if not config.parts:
        return args
    if args.distill_model:
        raise UserError("distill_model", "is Ultralytics' own distillation", "use teacher=, or drop the teacher")
    if args.quantize == 8:
        raise UserError("quantize=8", "quantization-aware training does not work with a teacher", "drop quantize")
    if args.compile:
        raise UserError(f"compile={args.compile}", "does not work with a teacher", "drop compile")
    if args.batch < 1:
        raise UserError(f"batch={args.batch}", "AutoBatch does not count the teacher's memory", "give batch=16, say")
    return args


def _check_distinct(teacher: object, student: object) -> None:
    if isinstance(student, str | Path) and teacher is not None:
        t, s = Path(str(teacher)), Path(student)
        if t == s or (t.exists() and s.exists() and t.samefile(s)):
            raise UserError(f"student={student}", "is the teacher's own file", "give a smaller model as the student")


def _check_fit(file: str, teacher: Teacher, config: Distillation, data: Mapping[str, Any]) -> None:
    if teacher.channels != data["channels"]:
        raise UserError(
            f"teacher={file}",
            f"takes {teacher.channels} channels, the data {data['channels']}",
            "use a teacher trained on such images",
        )
    wanting = [p.name for p in config.parts if registered()[p.name].wants_scores()]
    if wanting and not teacher.has_logits:
        raise UserError(
            f"teacher={file}",
            f"has no class scores per position, which {wanting[0]} needs",
            "use a YOLO teacher, or a method that compares feature maps alone, such as dfd",
        )
