"""The identity of a comparison's runs, as two hashes.

`config` says what is trained. `ground` says with which runs it may be compared: those of the same student, data, split
and settings of Ultralytics.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ultralytics.data.utils import img2label_paths
from ultralytics.utils import DEFAULT_CFG_DICT, ROOT

from yolokd.commands.candidates import NATIVE, PLAIN
from yolokd.commands.compare.ledger import TEACHER
from yolokd.config.parse import split_keys
from yolokd.config.schema import DistillationConfig, teacher_files
from yolokd.data.dataset import split_images
from yolokd.data.unlabelled import unlabelled_images
from yolokd.models.evaluate import SCORE_SETTINGS
from yolokd.models.teachers.backbone import is_backbone, load_backbone
from yolokd.runtime.files import sha256
from yolokd.training.plan import TrainPlan

FILES = frozenset({"teacher", "student", "data"})  # keys that name files; a run is identified by their content
# Keys that are not meant to change a score: where and how fast a run runs, and what it shows.
SCORE_NEUTRAL_KEYS = frozenset(
    {"device", "workers", "channels_last", "plots", "verbose", "check_teacher", "report", "trust", "force"}
    | {"save_period"}
)


@dataclass(frozen=True, kw_only=True)
class ComparisonRun:
    """A method with a seed: its keys of training, and the hashes that identify it.

    keys: those of `yolokd train`, without seed, device and save_dir. config: hash of all that shapes the training,
    except the seed. ground: hash of what runs must have in common to be compared (student, data, split, Ultralytics'
    settings). teacher_row: hash of the run that scores its teacher; empty if there is none. project: the folder that
    holds the runs' folders. strongest_teacher: the path of the last teacher, with whose predictions D_pred compares
    the student's; empty if there is none. classes_map, teacher_channels: for that teacher. None of these three enters
    the hashes: runs without a teacher have them, too.
    """

    method: str
    seed: int
    split: str
    keys: Mapping[str, Any]
    config: str
    ground: str
    project: Path
    teacher_row: str = ""
    strongest_teacher: str = ""
    classes_map: Mapping[str, str] | None = None
    teacher_channels: tuple[int, ...] | None = None

    @property
    def folder(self) -> Path:
        """Return the run's own folder; its name is the same each time, so that an interrupted run is resumed."""
        return self.project / f"{self.method}-seed{self.seed}-{self.config}"

    @property
    def hash(self) -> str:
        """Return the hash of the training and of the data that scores it."""
        return digest([self.config, self.ground, self.seed])

    @property
    def scores_path(self) -> Path:
        """Return the file into which the run's process writes its scores."""
        return self.folder / f"scores-{self.split}-{self.ground}.json"

    @property
    def weights(self) -> Path:
        """Return the folder of the run's checkpoints."""
        return self.folder / "weights"

    @property
    def trusts_files(self) -> bool:
        """Return whether the user trusts the code in checkpoints and data sets (`trust=True`)."""
        return bool(self.keys.get("trust"))

    @property
    def epochs(self) -> int:
        """Return the number of epochs of its training; 0 for a teacher, which is only scored."""
        return 0 if self.method == TEACHER else int(self.keys.get("epochs", DEFAULT_CFG_DICT["epochs"]))

    def epochs_done(self) -> int:
        """Return the number of epochs in results.csv."""
        results = self.folder / "results.csv"
        return max(sum(1 for _ in open(results, "rb")) - 1, 0) if results.exists() else 0


@dataclass(frozen=True)
class SharedContent:
    """Content that is the same for all runs of a comparison, with files replaced by hashes of their content.

    settings: Ultralytics' settings as the user gave them, without files and score-neutral keys. Defaults are left out:
    they are those of the Ultralytics version, which a ledger's row names. data: hash of the training and validation
    images. scored: hash of the images of the split that scores. student: the file's hash, a packaged model's name, or
    the content of a model's .yaml. teachers: hashes of the files, weakest first. unlabelled: hash of the images without
    labels; empty if there are none.
    """

    settings: Mapping[str, Any]
    data: str
    scored: str
    student: object
    teachers: tuple[str, ...]
    unlabelled: str


def read_shared_content(keys: Mapping[str, Any], plan: TrainPlan, split: str) -> SharedContent:
    """Read and hash the files of a comparison.

    keys: Ultralytics' settings with `student`, and the teachers' files as `teacher`. plan: of one of its trainings.
    """
    settings = {k: v for k, v in split_keys(keys).ultralytics.items() if k not in SCORE_NEUTRAL_KEYS | FILES}
    if isinstance(settings.get("pretrained"), str):
        settings["pretrained"] = sha256(settings["pretrained"])
    return SharedContent(
        settings,
        fingerprint(plan.data, "train", "val"),
        fingerprint(plan.data, split),
        _student_content(str(keys["student"]), plan),
        tuple(_teacher_content(file) for file in teacher_files(keys.get("teacher"))),
        _unlabelled_content(keys, plan),
    )


def training_hash(method: str, content: SharedContent, config: DistillationConfig) -> str:
    """Return the hash of all that shapes a training, except the seed; yolokd's settings count with their defaults."""
    identity = {
        "method": method,
        "settings": content.settings,
        "data": content.data,
        "student": content.student,
    }
    if method != PLAIN:
        identity["teacher"] = content.teachers[-1:] if method == NATIVE else content.teachers
    if method not in (PLAIN, NATIVE):
        uncounted = SCORE_NEUTRAL_KEYS | {"teacher", "unlabelled"}  # these count by their content
        if config.unlabelled:
            identity["unlabelled"] = content.unlabelled
        else:  # its ratio then has no effect, and earlier versions did not have it
            uncounted |= {"unlabelled_ratio"}
        # Earlier versions did not have these.
        uncounted |= {key for key in ("classes_map", "teacher_channels", "levels") if getattr(config, key) is None}
        if config.teachers == "stages":
            uncounted |= {"teachers"}
        identity["distillation"] = {k: v for k, v in config.flat().items() if k not in uncounted}
    return digest(identity)


def ground_hash(content: SharedContent, split: str) -> str:
    """Return the hash of what trainings must have in common to be compared."""
    return digest([split, content.scored, content.data, content.student, content.settings])


def teacher_hashes(
    keys: Mapping[str, Any], content: SharedContent, split: str, task: str = "detect"
) -> tuple[str, str]:
    """Return the hashes `config` and `ground` of the run that scores the strongest teacher.

    keys: the comparison's; only those that change a validation's scores count. task: on which it is scored.
    """
    validation = {key: keys[key] for key in SCORE_SETTINGS if key in keys}
    if keys.get("classes_map") is not None:
        validation["classes_map"] = keys["classes_map"]
    if keys.get("teacher_channels") is not None:
        validation["teacher_channels"] = keys["teacher_channels"]
    if task != "detect":  # earlier versions scored no other
        validation["task"] = task
    identity = {"teacher": content.teachers[-1], "imgsz": keys.get("imgsz", 640), **validation}
    return digest(identity), digest([split, content.scored])


def digest(content: object) -> str:
    """Return a short hash of a value, written as JSON; what JSON cannot hold counts by its `str`."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def fingerprint(data: Mapping[str, Any], *splits: str) -> str:
    """Return the hash of a data set's classes, of how its images and labels are read, and of some splits' files.

    Images count by names and sizes, labels by their content.
    """
    content = hashlib.sha256(json.dumps(sorted(data["names"].items())).encode())
    # Defaults are left out, because earlier versions did not count these keys.
    reading = {key: data[key] for key in ("kpt_shape", "flip_idx") if data.get(key)}
    if data.get("channels", 3) != 3:
        reading["channels"] = data["channels"]
    if reading:
        content.update(json.dumps(reading, sort_keys=True).encode())
    for split in splits:
        for image in sorted(split_images(data[split])) if data.get(split) else ():
            content.update(f"{split}/{image.name} {image.stat().st_size}".encode(errors="surrogateescape"))
            label = Path(img2label_paths([str(image)])[0])
            content.update(label.read_bytes() if label.exists() else b"")
    return content.hexdigest()


def _unlabelled_content(keys: Mapping[str, Any], plan: TrainPlan) -> str:
    """Return the hash of the names and sizes of the images without labels; empty if there are none."""
    if keys.get("unlabelled") is None:
        return ""
    images = unlabelled_images(str(keys["unlabelled"]), plan.data, plan.args, bool(keys.get("trust")))
    return digest([(Path(image).name, Path(image).stat().st_size) for image in images])


def _teacher_content(file: str) -> str:
    """Return the hash of a teacher's file; of a timm backbone, of its weights."""
    return load_backbone(file).sha256 if is_backbone(file) else sha256(file)


def _student_content(student: str, plan: TrainPlan) -> object:
    """Return what identifies a student: its file's content, or its name if it comes with Ultralytics."""
    if student.endswith(".pt"):
        return sha256(plan.student.pt_path)
    if _comes_with_ultralytics(student):
        return student
    return {k: v for k, v in plan.student.yaml.items() if k != "yaml_file"}


def _comes_with_ultralytics(student: str) -> bool:
    """Return whether Ultralytics would read a model's .yaml from its own package.

    It prefers a local file of that name, with or without the letter of the scale (yolov8n.yaml, yolov8.yaml).
    """
    stem = Path(student).stem
    stems = {stem, *(stem[:i] + stem[i + 1 :] for i in range(len(stem)))}
    packaged = {path.stem for path in (ROOT / "cfg" / "models").rglob("*.yaml")}
    local = any(Path(student).with_name(f"{name}.yaml").is_file() for name in stems)
    return Path(student).name == student and not local and not stems.isdisjoint(packaged)
