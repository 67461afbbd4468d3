"""The user's data set, as Ultralytics reads it."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import IMG_FORMATS, check_det_dataset
from ultralytics.utils import LOGGER, NUM_THREADS
from ultralytics.utils.patches import imread

from yolokd.data import shapes
from yolokd.errors import UserError, first_line
from yolokd.patches.safe_loading import safe_loading

Image = npt.NDArray[np.uint8]

EXPORT_IMAGES = 8  # ours: how many validation pictures an export is tried on
PRECISION_IMAGES = 4  # ours: how many a teacher's precision is tried on


def data_file(data: object) -> str:
    """The .yaml to hand to Ultralytics: `shapes` (and none given) is the embedded data set, made on first use."""
    return str(shapes.ensure()) if data in (None, "shapes") else str(data)


def with_data_file(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The same keys for Ultralytics, which does not know `data=shapes`."""
    return {**keys, **({"data": data_file(keys["data"])} if "data" in keys else {})}


def load_data(
    data: object, single_cls: bool = False, download: bool = True, trust: bool = False, split: str = "val"
) -> dict[str, Any]:
    """Ultralytics' data dictionary, after a check that training and `split` have images.

    Raises UserError where the data set is missing, broken or empty, or (without trust) brings code to download it.
    """
    argument, cure = f"data={data}", "give data= the .yaml of an existing set, or data=shapes"
    if data is not None and not isinstance(data, str | Path):
        raise UserError(argument, "is no data set", cure)
    try:
        with safe_loading(trust):
            loaded: dict[str, Any] = check_det_dataset(data_file(data), autodownload=download, split=split)
        empty = [s for s in ("train", split) if next(split_images(loaded[s]), None) is None]
    except UserError:
        raise
    except Exception as e:  # whatever the parsers of YAML, paths and archives raise
        raise UserError(argument, f"cannot be used: {first_line(e)}", cure) from e
    if empty:
        raise UserError(argument, f"no images in its {empty[0]} split ({loaded[empty[0]]})", "check the split's path")
    return loaded | {"names": {0: "item"}, "nc": 1} if single_cls else loaded


def check_images(data: dict[str, Any], args: Any) -> int:
    """Let Ultralytics scan images and labels as for a training with its settings `args`, and warn of what it skips.

    The scan fills the cache beside the labels that training reads. Returns how many images are left to train on.
    Raises UserError where there is none, or none to validate with, and for images that the scan passes and that cannot
    be read.
    """
    uncached = copy(args)
    uncached.cache = False
    images = _scan(data, uncached, "train", "train")
    _scan(data, uncached, "val", args.split)
    return images


def _scan(data: dict[str, Any], args: Any, mode: str, split: str) -> int:
    """The images of a split that can be used."""
    argument = f"data={args.data}"
    try:
        scanned = build_yolo_dataset(args, data[split], 1, dict(data), mode=mode)
        given = len(scanned.get_img_files(data[split]))
        unread = _unreadable(scanned)
    except Exception as e:  # whatever its readers of images and labels raise
        raise UserError(argument, f"its {split} split: {_why(e)}", "repair or remove what is broken") from e
    if mode == "train" and not any(len(label["cls"]) for label in scanned.labels):
        raise UserError(argument, "its training images have no labels", "check the paths of images and labels")
    if skipped := given - len(scanned.im_files):
        LOGGER.warning(f"data: {skipped} of {given} {split} images are skipped as broken, or with broken labels")
    if unread:
        some = f"{len(unread)} of its images cannot be read, such as {unread[0]}"
        raise UserError(argument, some, "repair or remove what is broken")
    return len(scanned.im_files)


def _why(error: Exception) -> str:
    """Ultralytics' first line says that nothing is left, the second why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _unreadable(scanned: Any) -> list[str]:
    """Those that OpenCV cannot decode, of the one common format whose damage the scan does not see."""
    doubtful = [file for file in scanned.im_files if Path(file).suffix.lower() == ".bmp"]
    with ThreadPool(NUM_THREADS) as pool:
        images = pool.imap(lambda file: imread(file, scanned.cv2_flag), doubtful)
        return [file for file, image in zip(doubtful, images, strict=True) if image is None]


def split_images(paths: str | list[str]) -> Iterator[Path]:
    """The image files of a split: of folders, or listed in text files, one path a line as Ultralytics reads them."""
    for path in map(Path, [paths] if isinstance(paths, str) else paths):
        if not path.exists():
            continue
        if path.is_dir():
            # Not rglob: this one follows links to folders, as Ultralytics does.
            files: Iterator[Path] = map(Path, glob.iglob(f"{glob.escape(str(path))}/**/*.*", recursive=True))
        else:
            lines = map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())
            files = (path.parent / line if line.startswith("./") else Path(line) for line in lines)
        yield from (file for file in files if file.suffix[1:].lower() in IMG_FORMATS and file.is_file())


def validation_images(data: str) -> list[Image]:
    """Up to PICTURES pictures (BGR, or of the data's other channels), spread over the validation split.

    Downloads nothing.

    Raises UserError where there is none to read.
    """
    images = _pictures(load_data(data, download=False), EXPORT_IMAGES)
    if not images:
        raise UserError(f"data={data}", "has no readable validation image", "give data= the .yaml of an existing set")
    return images


def sample_batch(data: dict[str, Any], imgsz: int) -> Tensor:
    """A few validation pictures as the networks see them: (B, channels, imgsz, imgsz) in 0..1."""
    if pictures := _pictures(data, PRECISION_IMAGES):
        return as_batch(pictures, (imgsz, imgsz))
    return torch.rand(PRECISION_IMAGES, data["channels"], imgsz, imgsz, generator=torch.Generator().manual_seed(0))


def as_batch(pictures: Sequence[Image], size: tuple[int, int]) -> Tensor:
    """Pictures letterboxed to a size (height, width): (B, C, H, W) float32 in 0..1; three channels as RGB."""
    letterbox = LetterBox(size)
    boxed = np.stack([letterbox(image=picture) for picture in pictures])
    if boxed.shape[-1] == 3:
        boxed = boxed[..., ::-1]
    return torch.from_numpy(boxed.transpose(0, 3, 1, 2).copy()).float() / 255


def _pictures(data: Mapping[str, Any], count: int) -> list[Image]:
    """Of the validation split, those that can be read and have the data's channels."""
    channels = data["channels"]
    flag = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(channels, cv2.IMREAD_UNCHANGED)  # as Ultralytics reads
    files = sorted(split_images(data["val"]))
    spread = [files[i * len(files) // count] for i in range(count)] if len(files) > count else files
    images = (imread(file, flag) for file in spread)
    return [image for image in images if image is not None and image.shape[2:] == (channels,)]
