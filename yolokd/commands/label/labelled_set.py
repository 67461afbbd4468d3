"""The folder of a labelled data set: its record, images, labels and data.yaml, each written atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ultralytics.data.utils import img2label_paths

from yolokd.commands.label.detect import Detection
from yolokd.errors import UserError
from yolokd.runtime.files import atomic_path, check_output_folder, remove_temporary_files, write_errors_as_user_errors
from yolokd.runtime.lock import held

RECORD, DATA, LOCK = "label.yaml", "data.yaml", ".label.lock"
ANOTHER = "give another name="


@dataclass(frozen=True)
class LabelledImage:
    """An image of the source; its link or copy in the data set; and the file with its labels."""

    source: Path
    image: Path
    label: Path

    @property
    def is_done(self) -> bool:
        """Return whether the labels are written; they are written last."""
        return self.label.exists()

    @property
    def boxes(self) -> list[tuple[int, list[float]]]:
        """Return the class of each labelled object, and its box (center, width, height) in shares of the image."""
        rows = [line.split() for line in self.label.read_text(encoding="utf-8").splitlines()]
        return [(int(row[0]), [float(value) for value in row[1:]]) for row in rows]

    def write(self, detections: Sequence[Detection], copy: bool) -> None:
        """Link or copy the image, then write its labels; an image without detections gets an empty file."""
        if not os.path.lexists(self.image):
            _place(self.source, self.image, copy)
        lines = [f"{d.label} {' '.join(f'{value:.6f}' for value in d.box)}\n" for d in detections]
        with atomic_path(self.label) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")


def _place(source: Path, image: Path, copy: bool) -> None:
    """Copy an image, or link to it; raise UserError if the system makes no links, or if the disk is full."""
    if copy:
        with atomic_path(image) as temporary:
            shutil.copyfile(source, temporary)
        return
    with write_errors_as_user_errors(image):
        try:
            image.symlink_to(source)
        except NotImplementedError as e:
            raise UserError("copy=False", "links cannot be made here", "give copy=True") from e


class LabelledSet:
    """The data set in `folder` that an interrupted labelling continues."""

    def __init__(self, folder: Path, sources: Sequence[Path]) -> None:
        self.folder = folder
        self.images = _place_all(folder, sources)

    @property
    def is_complete(self) -> bool:
        """Return whether data.yaml is there, which is written last."""
        return self.data_file.exists()

    @property
    def data_file(self) -> Path:
        """Return the path of data.yaml."""
        return self.folder / DATA

    def check(self, record: Mapping[str, Any]) -> None:
        """Raise UserError if the folder holds something else, or a data set that was begun with other settings."""
        argument = f"name={self.folder.name}"
        check_output_folder(self.folder, "name")
        if not self.folder.exists() or all(_is_leftover(path) for path in self.folder.iterdir()):
            return
        if not (self.folder / RECORD).is_file():
            raise UserError(argument, f"{self.folder} holds something else", ANOTHER)
        try:
            begun = yaml.safe_load((self.folder / RECORD).read_text(encoding="utf-8"))["settings"]
            begun.setdefault("batch", record["settings"]["batch"])  # which older records lack
            differing = [key for key, value in record["settings"].items() if begun[key] != value]
        except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as e:
            raise UserError(argument, f"its {RECORD} is none of yolokd's", ANOTHER) from e
        if differing:
            key = differing[0]
            now = f"{key}: {begun[key]} then, {record['settings'][key]} now"
            raise UserError(argument, f"was begun with other settings ({now})", "give the same ones, or another name=")

    def begin(self, record: Mapping[str, Any]) -> None:
        """Make the folders, write the record if there is none, and remove what a kill left half-written."""
        if not (self.folder / RECORD).exists():
            _write_yaml(record, self.folder / RECORD)
        for folder in {self.folder, *(f for image in self.images for f in (image.image.parent, image.label.parent))}:
            folder.mkdir(parents=True, exist_ok=True)
            if not folder.resolve().is_relative_to(self.folder.resolve()):
                raise UserError(f"name={self.folder.name}", f"its {folder} is a link that leads elsewhere", ANOTHER)
            remove_temporary_files(folder)

    def finish(self, content: Mapping[str, Any]) -> Path:
        """Write data.yaml, and return its path."""
        _write_yaml(content, self.data_file)
        return self.data_file


def _is_leftover(path: Path) -> bool:
    """Return whether a labelling that was killed before it wrote its record may have left this file."""
    return path.name == LOCK or path.suffix == ".tmp"


def _write_yaml(content: Mapping[str, Any], path: Path) -> None:
    with atomic_path(path) as temporary:
        text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
        temporary.write_text(text, encoding="utf-8")


def _place_all(folder: Path, sources: Sequence[Path]) -> list[LabelledImage]:
    """Return each image with its place in the data set: below `images`, as it lies below the images' common folder.

    sources: sorted absolute paths. Where two would share a file of labels (a.jpg, a.png), the second gets another name.
    """
    root = Path(os.path.commonpath([source.parent for source in sources]))
    taken: set[Path] = set()
    images = []
    for source in sources:
        name = source.relative_to(root)
        while name.with_suffix("") in taken:
            name = name.with_name(f"{name.stem}-{source.suffix[1:]}{source.suffix}")
        taken.add(name.with_suffix(""))
        image = folder / "images" / name
        images.append(LabelledImage(source, image, Path(img2label_paths([image])[0])))
    return images


def locked(folder: Path) -> AbstractContextManager[None]:
    """Hold a folder, which is made if it does not exist, for one labelling. Raises UserError if another holds it."""
    problem = "another `yolokd label` is writing into this folder"
    return held(folder / LOCK, UserError(f"name={folder.name}", problem, f"wait until it ends, or {ANOTHER}"))
