"""Images without labels, from a folder, a list or a data set."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolokd.data.dataset import listed_images, load_data, split_images
from yolokd.data.shape_labels import SHAPE_SETS
from yolokd.errors import UserError, first_line

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class ImageSource:
    """The images that the user named.

    images: absolute paths, sorted, each once; a list may name files that do not exist. data: Ultralytics' dictionary of
    the data set, or None for a folder or a list.
    """

    images: tuple[Path, ...]
    data: Mapping[str, Any] | None


def read_source(key: str, source: object, split: str | None = None, trust: bool = False) -> ImageSource:
    """Return the images of a folder with its subfolders, of a .txt that lists one image per line, or of a data .yaml.

    key: the argument that gives the source. split: of a data set (`train` if None). trust: whether its download may run
    code. Raises UserError if the source is none of these or has no image, and for a split of something that has none.
    """
    name, cure = f"{key}={source}", "give a folder, a .txt with one image per line, or a data set's .yaml"
    path = Path(str(source))
    is_data = path.suffix in {".yaml", ".yml"} or str(source) in SHAPE_SETS
    if split is not None and (not is_data or split not in SPLITS):
        cure_split = f"one of: {', '.join(SPLITS)}" if is_data else "drop it"
        raise UserError(f"split={split}", "is no split of the source", cure_split)
    try:
        data = load_data(str(source), trust=trust, split=split or "train") if is_data else None
    except UserError as e:
        raise UserError(name, e.problem, cure) from e
    if data is None and not (path.is_dir() or (path.is_file() and path.suffix == ".txt")):
        raise UserError(name, "is no folder, list or data set that exists", cure)
    try:
        found = split_images(data[split or "train"]) if data else listed_images(str(path))
        images = sorted({Path(os.path.abspath(image)) for image in found if not image.is_dir()})
    except (OSError, ValueError) as e:  # ValueError: a list that is no text, or a name with a NUL in it
        raise UserError(name, f"cannot be read: {first_line(e)}", cure) from e
    if not images:
        raise UserError(name, "has no images", cure)
    return ImageSource(tuple(images), data)
