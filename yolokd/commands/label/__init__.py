"""`yolokd label`: writes a teacher's detections as a YOLO data set."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from rich.table import Table

from yolokd.commands.label.detect import LabellingTeacher, read_batches
from yolokd.commands.label.labelled_set import LabelledImage, LabelledSet, locked
from yolokd.commands.label.sample import draw_sample
from yolokd.commands.label.settings import LabelSettings, check_label_settings
from yolokd.data.dataset import load_data, split_images
from yolokd.data.sources import ImageSource, read_source
from yolokd.data.unlabelled import copies
from yolokd.errors import UserError
from yolokd.models.origin import versions
from yolokd.patches.safe_loading import safe_loading
from yolokd.runtime.console import CONSOLE, make_progress, print_table
from yolokd.runtime.files import check_project, sha256
from yolokd.training.settings import check_device

PICTURE = "sample.png"
IMAGES = "images"  # the folder of the images, relative to data.yaml


def run_label(**keys: Any) -> Path:
    """Write the teacher's detections in the images of a source as a YOLO data set; return the path of its data.yaml.

    keys: the fields of LabelSettings, `copy` for `copy_images`. A labelling that was interrupted goes on when it is
    started again with the same keys. Images that cannot be read are named and left out.
    Raises UserError for what cannot work, before anything is written, and if no image can be read.
    """
    settings = check_label_settings(keys)
    device = check_device(settings.device)
    source = read_source("source", settings.source, settings.split, settings.trust)
    folder = check_project(settings.project) / (settings.name or _source_name(settings.source))
    images = [image for image in source.images if not image.is_relative_to(folder)]
    if not images:
        raise UserError(
            f"source={settings.source}",
            f"all its images lie in {folder}, where the data set would be written",
            "give another name=",
        )
    with safe_loading(settings.trust):
        teacher = LabellingTeacher(settings.teacher, settings.detection, device, settings.trust)
        data = _describe_data(settings, source, teacher)
        labelled = LabelledSet(folder, images)
        labelled.check(record := _make_record(settings, images, teacher, data["val"]))
        try:
            with locked(folder):
                return _write(labelled, record, data, teacher, settings)
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt("repeat the same command to continue") from e


def _source_name(source: str) -> str:
    """Return the name of a folder, or of a file without its ending."""
    path = Path(source).absolute()
    return path.name if path.is_dir() else path.stem


def _write(
    labelled: LabelledSet,
    record: Mapping[str, Any],
    data: Mapping[str, Any],
    teacher: LabellingTeacher,
    settings: LabelSettings,
) -> Path:
    """Write what is missing of a data set, data.yaml last; return its path. record, data: of its two .yaml files."""
    if labelled.is_complete:
        CONSOLE.print("this data set is complete; nothing was written")
        return labelled.data_file
    labelled.begin(record)
    unreadable = _label(labelled.images, teacher, settings)
    done = [image for image in labelled.images if image.is_done]
    if not done:
        problem = f"none of its {len(unreadable)} images can be read"
        raise UserError(
            f"source={settings.source}", problem, f"give images of {teacher.channels} channels, as the teacher takes"
        )
    picture = labelled.folder / PICTURE
    draw_sample(done, teacher.names, teacher.channels, picture)
    _print_summary(done, unreadable, teacher.names)
    if data["val"] == IMAGES:
        CONSOLE.print(
            "validation: data.yaml validates on these images and labels themselves: the scores "
            "tell how well a student imitates the teacher, not how well it detects"
        )
    elif leaked := copies([str(image.source) for image in done], map(str, split_images(data["val"]))):
        CONSOLE.print(f"validation: it has {len(leaked)} of these images, too, so its scores will be too high")
    CONSOLE.print(picture, labelled.finish(data), sep="\n")
    return labelled.data_file


def _label(images: Sequence[LabelledImage], teacher: LabellingTeacher, settings: LabelSettings) -> list[Path]:
    """Write the labels that are missing; return the images that cannot be read, after printing their names.

    A labelling that goes on uses the same batches as before: Ultralytics pads the images of a batch to one shape, which
    changes detections.
    """
    batches = [images[i : i + settings.batch] for i in range(0, len(images), settings.batch)]
    undone = [batch for batch in batches if not all(image.is_done for image in batch)]
    unreadable: list[Path] = []
    with make_progress() as progress:
        task = progress.add_task("label", total=len(images))
        progress.advance(task, len(images) - sum(map(len, undone)))
        files = [[image.source for image in batch] for batch in undone]
        for batch, pixels in zip(undone, read_batches(files, teacher.channels), strict=True):
            read = [(image, array) for image, array in zip(batch, pixels, strict=True) if array is not None]
            for image, array in zip(batch, pixels, strict=True):
                if array is None:
                    unreadable.append(image.source)
                    CONSOLE.print("left out, cannot be read:", image.source)
            if not all(image.is_done for image, _ in read):
                detections = teacher.detect([array for _, array in read])
                for (image, _), found in zip(read, detections, strict=True):
                    if not image.is_done:
                        image.write(found, settings.copy_images)
            progress.advance(task, len(batch))
    return unreadable


def _make_record(
    settings: LabelSettings, images: Sequence[Path], teacher: LabellingTeacher, val: object
) -> dict[str, Any]:
    """Return what label.yaml holds: the settings that a labelling must have to go on, and what it was made from."""
    listed = hashlib.sha256("\n".join(map(str, images)).encode(errors="surrogateescape"))
    return {
        "settings": {
            "teacher": sha256(teacher.path),
            "images": f"{len(images)}, {listed.hexdigest()}",
            **settings.detection.model_dump(),
            "val": val,
            "copy": settings.copy_images,
            "batch": settings.batch,  # Ultralytics pads the images of a batch to a common shape
        },
        "teacher": str(teacher.path.absolute()),
        "source": str(Path(settings.source).absolute()),
        "versions": versions(),
    }


def _describe_data(settings: LabelSettings, source: ImageSource, teacher: LabellingTeacher) -> dict[str, Any]:
    """Return what data.yaml holds; its paths are relative to its own folder, but for the user's validation images.

    Raises UserError if the classes of `val=` are not the teacher's, in the same order.
    """
    data = source.data if settings.val is None else load_data(settings.val, trust=settings.trust)
    fits = data is not None and data["names"] == teacher.names
    if settings.val is not None and not fits:
        raise UserError(
            f"val={settings.val}",
            f"its classes are not the teacher's, {', '.join(teacher.names.values())}",
            "give a data set with the teacher's classes in their order, or set val: in the data.yaml yourself",
        )
    val = (data.get("val") if data is not None and fits else None) or IMAGES
    return {"train": IMAGES, "val": val, "channels": teacher.channels, "names": teacher.names}


def _print_summary(done: Sequence[LabelledImage], unreadable: Sequence[Path], names: Mapping[int, str]) -> None:
    """Print how many boxes of each class there are, and how many images have none or were left out."""
    classes = [[label for label, _ in image.boxes] for image in done]
    table = Table("class", "boxes", "images", title=f"labels of {len(done)} images")
    for label, count in sorted(Counter(chain(*classes)).items()):
        table.add_row(names[label], f"{count:,}", f"{sum(label in found for found in classes):,}")
    print_table(table)
    if empty := sum(not found for found in classes):
        CONSOLE.print(f"{empty} images without a detection: their label files are empty, so that they are background")
    if empty == len(done):
        CONSOLE.print("no image has a detection, and a training needs some: label with a lower conf=")
    if unreadable:
        CONSOLE.print(f"{len(unreadable)} images cannot be read: they are left out")
