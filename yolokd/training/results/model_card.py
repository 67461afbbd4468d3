"""MODEL_CARD.md beside best.pt: what the student was taught by, on which data, how it scores, and how to run it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from ultralytics.utils.torch_utils import get_num_params

from yolokd.data.dataset import data_name
from yolokd.models.checkpoint import load_model
from yolokd.models.origin import origin_of, record_of, versions
from yolokd.models.tasks import TASKS, task_of
from yolokd.training.results.provenance import flattened

NAME = "MODEL_CARD.md"
TEMPLATE = "model_card.md.jinja"
SCORES = ("precision", "recall", "mAP50", "mAP50-95")  # Ultralytics' names, in the order of the card's columns
FINDS = {  # what a model of each task does with an object
    "detect": "draws a box around each",
    "segment": "marks the area of each",
    "pose": "marks the keypoints of each",
    "obb": "draws a rotated box around each",
}
HUB_TASKS = {"segment": "image-segmentation", "pose": "keypoint-detection"}  # others are object-detection
TRAINING = ("imgsz", "batch", "optimizer", "lr0", "seed")  # Ultralytics' settings that the card names
# What Markdown or HTML could read as markup, and what GitHub turns into links and mentions.
MARKUP = re.compile(r"[\\`*_\[\]<>#|~$&:@]|(?<=www)\.", re.IGNORECASE)


def write_model_card(trainer: Any) -> None:
    """Write the card of a finished run beside its best.pt, after Ultralytics has validated that file.

    Raises UserError if best.pt cannot be read or the card cannot be written.
    """
    if trainer.best.exists():
        (trainer.wdir / NAME).write_bytes(model_card(card_content(trainer)).encode(errors="replace"))


def model_card(content: Mapping[str, Any]) -> str:
    """Return the card as Markdown, with the metadata in front that the Hugging Face hub reads.

    content: what `card_content` returns.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        finalize=as_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    metadata = yaml.safe_dump(hub_metadata(content), sort_keys=False, allow_unicode=True)
    return f"---\n{metadata}---\n\n{environment.get_template(TEMPLATE).render(content)}"


def as_markdown(value: object) -> str:
    r"""Return a value as one line of Markdown that shows it as it is, whatever characters it holds.

    >>> print(as_markdown("red_cell | <b>"))
    red\_cell \| \<b\>
    """
    return MARKUP.sub(r"\\\g<0>", " ".join(str(value).split()))


def card_content(trainer: Any) -> dict[str, Any]:
    """Return what the card says of a finished run, as plain data without folders of this machine."""
    student, _ = load_model(trainer.best, "best", trainer.plan.config.trust)
    record, teachers = record_of(student), origin_of(student).teachers
    name = PurePath(str(student.yaml.get("yaml_file") or "YOLO detector")).stem
    taught_by = f"taught by {', '.join(teacher.file for teacher in teachers)}" if teachers else "without a teacher"
    own = {key: value for key, value in record.items() if key not in ("teacher", "versions", "unlabelled")}
    settings = {"method": "none", **own, **{key: getattr(trainer.args, key) for key in TRAINING}}
    metrics, task = trainer.validator.metrics, trainer.plan.task
    by_class = [
        {**row, "scores": [round(float(score), 3) for score in getattr(metrics, task.part).class_result(i)]}
        for i, row in enumerate(metrics.summary(decimals=3))
    ]
    measured = {row["Class"] for row in by_class}
    return {
        "task": task.name,
        "exportable": task_of(student) is not TASKS["rtdetr"],
        "finds": FINDS[task.name],
        "title": f"{name}, {taught_by}",
        "student": name,
        "millions": round(get_num_params(student) / 1e6, 2),
        "names": list(trainer.data["names"].values()),
        "teachers": teachers,
        "settings": without_folders(flattened(settings) | {"epochs": trainer.epoch + 1}),
        "data": data_name(str(trainer.args.data), trainer.data),
        "train_images": len(trainer.train_loader.dataset),
        "unlabelled": len(trainer.plan.unlabelled),
        "val_images": trainer.validator.seen,
        "objects": int(metrics.nt_per_class.sum()),
        "split": trainer.args.split,
        "imgsz": trainer.args.imgsz,
        "overall": [round(float(trainer.metrics[task.score_column(score)]), 3) for score in SCORES],
        "by_class": by_class,
        "unmeasured": [name for name in trainer.data["names"].values() if name not in measured],
        "chosen": trainer.args.val and trainer.args.split == "val",
        "versions": versions(),
    }


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the names of files alone where values are absolute paths."""
    return {
        key: PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value
        for key, value in settings.items()
    }


def hub_metadata(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's metadata as the Hugging Face hub specifies it.

    Specification: https://github.com/huggingface/hub-docs/blob/main/modelcard.md. The user's data set has no name on
    the hub, so its type is `custom`.
    """
    scores = zip(SCORES, content["overall"], strict=True)
    task = HUB_TASKS.get(content["task"], "object-detection")
    dataset = {"type": "custom", "name": content["data"], "split": content["split"]}
    result = {
        "task": {"type": task},
        "dataset": dataset,
        "metrics": [{"type": score.lower(), "name": score, "value": value} for score, value in scores],
    }
    return {
        "license": "agpl-3.0",
        "library_name": "ultralytics",
        "pipeline_tag": task,
        "tags": ["ultralytics", "yolo", "yolokd", *(["knowledge-distillation"] if content["teachers"] else [])],
        "metrics": [score.lower() for score in SCORES],
        "model-index": [{"name": content["title"], "results": [result]}],
    }
