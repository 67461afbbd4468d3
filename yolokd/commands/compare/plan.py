"""Which runs a comparison consists of, and what identifies each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralytics.utils import ROOT

from yolokd.commands.candidates import NATIVE, PLAIN, setting_applies
from yolokd.commands.compare.ledger import TEACHER
from yolokd.commands.compare.runs import FILES, NMS_SETTINGS, SCORE_NEUTRAL_KEYS, ComparisonRun, digest, fingerprint
from yolokd.config.arguments import as_list
from yolokd.config.parse import check_keys, is_yolokd_key
from yolokd.config.schema import DistillationConfig, normalize_teachers, teacher_files
from yolokd.config.ultralytics_keys import KNOWN_KEYS
from yolokd.data.dataset import check_images, data_file, split_images
from yolokd.errors import UserError
from yolokd.models.checkpoint import as_paths, load_model, load_teacher
from yolokd.models.detector import Detector, only_detects
from yolokd.pyramid.pairing import pair_classes
from yolokd.runtime.console import CONSOLE
from yolokd.runtime.files import sha256
from yolokd.training.plan import TrainPlan, make_plan
from yolokd.training.settings import training_keys

QUIET = {"plots": False, "verbose": False, "check_teacher": False}
COMPARISON_KEYS = frozenset({"seeds", "csv"})  # a comparison's own keys
REFUSED_KEYS = dict.fromkeys(("save_dir", "name", "exist_ok", "resume", "cfg"), "drop it") | {
    "seed": "give seeds=0,1,2"
}
SPLITS = ("train", "val", "test")


def plan_runs(
    methods: Sequence[str], seeds: object, split: str, project: Path, keys: Mapping[str, Any]
) -> tuple[list[ComparisonRun], int]:
    """All runs, checked, the teacher's score first; and the images of an epoch.

    Raises UserError for what cannot work.
    """
    check_keys(keys, KNOWN_KEYS | COMPARISON_KEYS)
    for key in keys:
        if key in REFUSED_KEYS:
            raise UserError(key, "is each run's own in a comparison", REFUSED_KEYS[key])
    own_seeds = _seeds(seeds)
    if split not in SPLITS:
        raise UserError(f"split={split}", "is no split", f"one of: {', '.join(SPLITS)}")
    given = training_keys({**keys, "teacher": normalize_teachers(as_paths(keys.get("teacher"), "teacher"))})
    given |= {"student": given.pop("model"), "data": data_file(given["data"])}
    trust = bool(given.get("trust"))
    if isinstance(given.get("pretrained"), str | Path):  # the first run would download what the hash takes for a name
        given["pretrained"] = str(load_model(given["pretrained"], "pretrained", trust)[0].pt_path)
    teachers = [load_teacher(file, trust) for file in teacher_files(given["teacher"])]
    if NATIVE in methods and not teachers:
        raise UserError("teacher", "is missing", "give teacher=yolov8l.pt, say, or drop native")
    files = [str(teacher.pt_path) for teacher in teachers]
    given["teacher"], strongest = (normalize_teachers(files), files[-1]) if files else (None, None)
    trained: list[ComparisonRun] = []
    content: dict[str, Any] = {}
    for method in methods:
        own = _own(given, method) | QUIET
        own |= {"teacher": strongest} if method == NATIVE else {}
        # Ultralytics' own distillation needs what plain training needs, and a teacher
        plan = make_plan(training_keys(own | ({"method": PLAIN} if method == NATIVE else {})))
        _check_scorable(own)
        if next(split_images(plan.data.get(split) or []), None) is None:
            raise UserError(f"split={split}", "is not in the data set", "give split=val, or a set that has it")
        if not content:
            images = check_images(plan.data, plan.args)  # it mends some files, and what they hold is hashed
            content = _content(given, plan, split)
        known = _known(own, plan, content)
        ground = digest([split, content["scored"], *(known[key] for key in ("data", "student", "settings"))])
        own |= _told(plan.config)
        trained += [ComparisonRun(method, seed, split, own, digest(known), ground, "", project) for seed in own_seeds]
    if not strongest or not can_score_teacher(teachers[-1], plan):
        return trained, images
    known = {"teacher": content["teacher"][-1], "imgsz": given.get("imgsz", 640)}
    known |= {key: given[key] for key in NMS_SETTINGS if key in given}
    own = _own(given, PLAIN) | {"method": TEACHER, "teacher": strongest}
    taught = ComparisonRun(TEACHER, 0, split, own, digest(known), digest([split, content["scored"]]), "", project)
    named = [run if run.method == PLAIN else replace(run, teacher_row=taught.hash) for run in trained]
    return [taught, *named], images


def _own(given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The keys that a method's runs have."""
    return {k: v for k, v in given.items() if setting_applies(k, method) or k == "trust"} | {"method": method}


def _told(config: DistillationConfig) -> dict[str, Any]:
    """What a row's settings tell also at the defaults, which may change one day."""
    schedules = {f"{part.name}.schedule": part.schedule.schedule for part in config.method_configs}
    return {"balance": config.balance, "level_weights": config.level_weights, **schedules} if schedules else {}


def _check_scorable(own: Mapping[str, Any]) -> None:
    """What trains and would then be scored otherwise, or not at all."""
    if own.get("batch", 16) < 1:
        raise UserError(f"batch={own['batch']}", "AutoBatch may differ from run to run", "give batch=16, say")
    if own.get("distill_model"):
        raise UserError("distill_model", "is what method=native is for", "use teacher=, and method=native")
    if own.get("time"):
        raise UserError("time", "makes scores depend on how busy the machine is", "use epochs=")
    if own.get("classes") is not None:
        raise UserError("classes", "does not reach the scores of a comparison", "give a data set of those classes")


def can_score_teacher(teacher: Detector, plan: TrainPlan) -> bool:
    """Whether a teacher can be scored on the data; says so where it cannot: no share of a gap is told then."""
    scored = only_detects(teacher) and bool(pair_classes(teacher.names, plan.data["names"]).teacher)
    if not scored:
        CONSOLE.print("teacher: does more than detect, or knows none of the classes: it has no score here")
    return scored


def _content(given: Mapping[str, Any], plan: TrainPlan, split: str) -> dict[str, Any]:
    """What the files hold, read once for all runs."""
    return {
        "data": fingerprint(plan.data, "train", "val"),
        "scored": fingerprint(plan.data, split),
        "student": _student_content(str(given["student"]), plan),
        "teacher": [sha256(teacher) for teacher in teacher_files(given["teacher"])],
    }


def _student_content(student: str, plan: TrainPlan) -> object:
    """Of a file what it holds; the models that come with Ultralytics are known by their names."""
    if student.endswith(".pt"):
        return sha256(plan.student.pt_path)
    return (
        student
        if _comes_with_ultralytics(student)
        else {k: v for k, v in plan.student.yaml.items() if k != "yaml_file"}
    )


def _comes_with_ultralytics(student: str) -> bool:
    """Whether a .yaml is of its package: a file of that name, with or without the scale's letter, goes before."""
    stem = Path(student).stem
    stems = {stem, *(stem[:i] + stem[i + 1 :] for i in range(len(stem)))}
    packaged = {path.stem for path in (ROOT / "cfg" / "models").rglob("*.yaml")}
    local = any(Path(student).with_name(f"{name}.yaml").is_file() for name in stems)
    return Path(student).name == student and not local and not stems.isdisjoint(packaged)


def _known(own: Mapping[str, Any], plan: TrainPlan, content: Mapping[str, Any]) -> dict[str, Any]:
    """All that shapes a training, but for the seed: files by their content, yolokd's settings with their defaults.

    Of Ultralytics' settings those that were given: their defaults are those of the version in the row.
    """
    settings = {k: v for k, v in own.items() if not is_yolokd_key(k) and k not in SCORE_NEUTRAL_KEYS | FILES}
    if isinstance(settings.get("pretrained"), str):
        settings["pretrained"] = sha256(settings["pretrained"])
    known = {"method": own["method"], "settings": settings, "data": content["data"], "student": content["student"]}
    if own["method"] != PLAIN:
        known["teacher"] = content["teacher"][-1:] if own["method"] == NATIVE else content["teacher"]
    if own["method"] not in (PLAIN, NATIVE):
        known["distillation"] = {
            k: v for k, v in plan.config.flat().items() if k not in SCORE_NEUTRAL_KEYS | {"teacher"}
        }
    return known


def _seeds(seeds: object) -> list[int]:
    found = as_list(seeds)
    numbers = all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in found)
    if not found or not numbers or len(set(found)) < len(found):
        raise UserError(f"seeds={seeds}", "must be different whole numbers of at least 0", "for example seeds=0,1,2")
    return found
