"""Which runs a comparison consists of, and what identifies each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralytics.utils import ROOT

from yolokd.checkpoint import as_paths, sha256
from yolokd.compare.ledger import TEACHER
from yolokd.compare.runs import FILES, INCIDENTAL, Run, fingerprint
from yolokd.config import as_teachers, each_teacher, is_own, listed
from yolokd.console import CONSOLE
from yolokd.contenders import NATIVE, PLAIN, concerns
from yolokd.data import data_file, split_images
from yolokd.errors import UserError
from yolokd.plan import Plan, load_teacher, make_plan, training_keys
from yolokd.pyramid import Detector, pair_classes
from yolokd.score import only_detects

QUIET = {"plots": False, "verbose": False, "check_teacher": False}
TOLD = ("balance", "level_weights")  # in a row's settings also at their defaults, which may change one day
OURS_ALONE = frozenset({"save_dir", "name", "exist_ok", "resume", "seed", "cfg"})  # each run has its own


def planned(
    methods: Sequence[str], seeds: object, split: str, project: Path, keys: Mapping[str, Any]
) -> tuple[list[Run], int]:
    """All runs, checked, the teacher's score first; and the images of an epoch.

    Raises UserError for what cannot work.
    """
    for key in keys:
        if key in OURS_ALONE:
            raise UserError(key, "is each run's own in a comparison", f"drop {key}")
    own_seeds = _seeds(seeds)
    given = training_keys({**keys, "teacher": as_teachers(as_paths(keys.get("teacher"), "teacher"))})
    given |= {"student": given.pop("model"), "data": data_file(given["data"])}
    strongest = each_teacher(given["teacher"])[-1] if given["teacher"] else None
    teacher = load_teacher(strongest, bool(given.get("trust"))) if strongest or NATIVE in methods else None
    runs: list[Run] = []
    content: dict[str, Any] = {}
    for method in methods:
        own = {k: v for k, v in given.items() if concerns(k, method) or k == "trust"} | QUIET | {"method": method}
        own |= {"teacher": strongest} if method == NATIVE else {}
        # Ultralytics' own distillation needs what plain training needs, and a teacher
        plan = make_plan(training_keys(own | ({"method": PLAIN} if method == NATIVE else {})))
        if next(split_images(plan.data.get(split) or []), None) is None:
            raise UserError(f"split={split}", "is not in the data set", "give split=val, or a set that has it")
        content = content or _content(given, plan)
        known = _known(own, plan, content)
        own |= {key: getattr(plan.config, key) for key in TOLD} if plan.config.parts else {}
        runs += [
            Run(method, seed, split, own, json.dumps(known | {"seed": seed}, sort_keys=True), project)
            for seed in own_seeds
        ]
    images = plan.images
    if strongest and teacher and _has_score(teacher, plan):
        known = {"teacher": sha256(strongest), "data": content["data"], "imgsz": given.get("imgsz", 640)}
        own = {**given, "method": TEACHER, "teacher": strongest}
        runs.insert(0, Run(TEACHER, 0, split, own, json.dumps(known, sort_keys=True), project))
    return runs, images


def _has_score(teacher: Detector, plan: Plan) -> bool:
    """Whether a teacher can be scored on the data; says so where it cannot: no share of a gap is told then."""
    scored = only_detects(teacher) and bool(pair_classes(teacher.names, plan.data["names"]).teacher)
    if not scored:
        CONSOLE.print("teacher: does more than detect, or knows none of the classes: it has no score here")
    return scored


def _content(given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """What the files hold, read once for all runs."""
    student, teachers = given["student"], [sha256(teacher) for teacher in each_teacher(given["teacher"])]
    return {
        "data": fingerprint(plan.data),
        "student": _student_content(str(student), plan),
        "teacher": teachers if len(teachers) > 1 else (None, *teachers)[-1],
    }


def _student_content(student: str, plan: Plan) -> object:
    """Of a file what it holds; the models that come with Ultralytics are known by their names."""
    if student.endswith(".pt"):
        return sha256(student) if Path(student).is_file() else student
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


def _known(own: Mapping[str, Any], plan: Plan, content: Mapping[str, Any]) -> dict[str, Any]:
    """All that shapes a training, but for the seed: files by their content, yolokd's settings with their defaults."""
    settings = {k: v for k, v in own.items() if not is_own(k) and k not in INCIDENTAL | FILES}
    known = {"method": own["method"], "settings": settings, "data": content["data"], "student": content["student"]}
    if own["method"] != PLAIN:
        known["teacher"] = sha256(own["teacher"]) if own["method"] == NATIVE else content["teacher"]
    if own["method"] not in (PLAIN, NATIVE):
        known["distillation"] = {k: v for k, v in plan.config.flat().items() if k not in INCIDENTAL | {"teacher"}}
    return known


def _seeds(seeds: object) -> list[int]:
    found = listed(seeds)
    if not found or any(isinstance(s, bool) or not isinstance(s, int) for s in found) or len(set(found)) < len(found):
        raise UserError(f"seeds={seeds}", "must be different whole numbers", "for example seeds=0,1,2")
    return found
