"""Checks of the user's data set as Ultralytics reads it, and samples of its validation images."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePath
from typing import Any, TypeVar

import cv2
import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from ultralytics.data.augment import LetterBox
from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import IMG_FORMATS, check_det_dataset, img2label_paths
from ultralytics.utils import LOGGER, NUM_THREADS
from ultralytics.utils.patches import imread

from yolokd.data import shapes
from yolokd.data.class_names import ClassNames
from yolokd.data.shape_labels import SHAPE_SETS
from yolokd.errors import UserError, describe_invalid, first_line
from yolokd.patches.no_ghostscript import no_ghostscript
from yolokd.patches.safe_loading import safe_loading

Image = npt.NDArray[np.uint8]
T = TypeVar("T")

EXPORT_IMAGES = 8  # ours: the number of validation images that an export is compared on
COMMON_STEMS = frozenset({"data", "dataset"})  # names of a .yaml that do not tell which data set it is
PRECISION_IMAGES = 4  # ours: the number that a teacher's precision is chosen on


def data_file(data: object) -> str:
    """Return the path of a data set's .yaml; `shapes` (also None), `shapes-seg`, … are drawn on first use."""
    name = "shapes" if data is None else str(data)
    return str(shapes.ensure(name=name)) if name in SHAPE_SETS else name


def with_data_file(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys with the path of a .yaml as `data`, if they have it: Ultralytics does not know `data=shapes`."""
    return {**keys, **({"data": data_file(keys["data"])} if "data" in keys else {})}


def data_name(file: str, data: Mapping[str, Any]) -> str:
    """Return the name of a data set: that of its .yaml, or of its folder if all sets call the .yaml so.

    >>> data_name("/sets/blood.yaml", {"path": "/sets"}), data_name("/sets/cells/data.yaml", {"path": "/sets/cells"})
    ('blood', 'cells')
    """
    stem = PurePath(file).stem
    return PurePath(data["path"]).name if stem in COMMON_STEMS and "path" in data else stem


def load_data(
    data: object, single_cls: bool = False, download: bool = True, trust: bool = False, split: str = "val"
) -> dict[str, Any]:
    """Return Ultralytics' dictionary of a data set, after a check that its splits `train` and `split` have images.

    single_cls: whether all classes count as one, `item`. download: whether to download a missing data set.
    Raises UserError if the data set is missing, broken or empty, or if its download is code and not `trust`.
    """
    argument, cure = f"data={data}", "give data= the .yaml of an existing data set, or data=shapes"
    if data is not None and not isinstance(data, str | Path):
        raise UserError(argument, "is not a path", cure)
    try:
        with safe_loading(trust):
            loaded: dict[str, Any] = check_det_dataset(data_file(data), autodownload=download, split=split)
        empty = [s for s in ("train", split) if next(split_images(loaded[s]), None) is None]
    except UserError:
        raise
    except Exception as e:  # whatever the parsers of YAML, paths and archives raise
        raise UserError(argument, f"cannot be used: {first_line(e)}", cure) from e
    _check_names(argument, loaded)
    if empty:
        raise UserError(argument, f"no images in its {empty[0]} split ({loaded[empty[0]]})", "check the split's path")
    return loaded | {"names": {0: "item"}, "nc": 1} if single_cls else loaded


def learned_names(data: Mapping[str, Any], classes: object) -> dict[int, str]:
    """Return the classes of a data set that a training learns. classes: Ultralytics' setting; None: all."""
    wanted = classes if isinstance(classes, list | tuple) else [classes]
    return {index: name for index, name in data["names"].items() if classes is None or index in wanted}


def _check_names(argument: str, data: Mapping[str, Any]) -> None:
    """Raise UserError unless each class of a data set has a name; Ultralytics has turned numbers into text."""
    cure = "list one name for each class in the .yaml"
    try:
        names = TypeAdapter(ClassNames).validate_python(data["names"], strict=True)
    except ValidationError as e:
        raise UserError(argument, describe_invalid(e, "names"), cure) from e
    if len(names) != data["nc"]:  # `0` and `"0"` are one index
        raise UserError(argument, f"has {data['nc']} classes, but {len(names)} names", cure)


def check_images(data: dict[str, Any], args: Any, trust: bool = False) -> int:
    """Scan images and labels as a training with Ultralytics' settings `args` does; log skipped and unlabelled images.

    The scan fills the cache beside the labels, which the training reads. trust: whether a cache may hold code. Returns
    the number of training images left.
    Raises UserError if no image is left to train on or to validate with, or if an image that passes the scan cannot be
    read.
    """
    args = uncached(args)
    with safe_loading(trust):
        images = _scan(data, args, "train", "train")
        _scan(data, args, "val", args.split)
    return images


def boxes_per_class(data: dict[str, Any], args: Any, trust: bool = False) -> Counter[int]:
    """Return how many labelled boxes of each class a training with Ultralytics' settings `args` has.

    trust: whether a label cache may hold code.
    """
    args = uncached(args)
    with safe_loading(trust):
        scanned = build_yolo_dataset(args, data["train"], 1, dict(data), mode="train")
    return Counter(int(cls) for label in scanned.labels for cls in label["cls"].flatten())


def uncached(args: Any) -> Any:
    """Return Ultralytics' settings for a scan: it caches no images."""
    args = copy(args)
    args.cache = False
    return args


def _scan(data: dict[str, Any], args: Any, mode: str, split: str) -> int:
    """Scan a split, and return the number of images that can be used."""
    argument = f"data={args.data}"
    try:
        scanned = build_yolo_dataset(args, data[split], 1, dict(data), mode=mode)
        total = len(scanned.get_img_files(data[split]))
        unreadable = undecodable_bitmaps(scanned.im_files, scanned.cv2_flag)
    except Exception as e:  # whatever its readers of images and labels raise
        raise UserError(argument, f"its {split} split: {_reason(e)}", "repair or remove what is broken") from e
    if mode == "train" and not any(len(label["cls"]) for label in scanned.labels):
        raise UserError(argument, "its training images have no labels", "check the paths of images and labels")
    if skipped := total - len(scanned.im_files):
        LOGGER.warning(f"data: {skipped} of {total} {split} images are skipped: the image or its labels are broken")
    if unlabelled := _without_label_file(scanned):
        LOGGER.info(f"data: {unlabelled} of {total} {split} images have no label file and count as background")
    if unreadable:
        problem = f"{len(unreadable)} of its images cannot be read, such as {unreadable[0]}"
        raise UserError(argument, problem, "repair or remove what is broken")
    return len(scanned.im_files)


def _without_label_file(scanned: Any) -> int:
    """Return how many of the images have no label file; an empty file says that an image is background."""
    without_boxes = [label["im_file"] for label in scanned.labels if not len(label["cls"])]
    return sum(not Path(file).exists() for file in img2label_paths(without_boxes))


def _reason(error: Exception) -> str:
    """Return the first two lines of Ultralytics' error: that no image is left, and why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def undecodable_bitmaps(files: Iterable[str], flag: int) -> list[str]:
    """Return the .bmp files that OpenCV cannot decode: the one common format whose damage the scan does not detect.

    flag: with which OpenCV reads.
    """
    bitmaps = [file for file in files if Path(file).suffix.lower() == ".bmp"]
    with ThreadPool(NUM_THREADS) as pool:
        images = pool.imap(lambda file: imread(file, flag), bitmaps)
        return [file for file, image in zip(bitmaps, images, strict=True) if image is None]


def split_images(paths: str | list[str]) -> Iterator[Path]:
    """Yield the image files of a split, as Ultralytics finds them: those of `listed_images` that exist."""
    return (file for file in listed_images(paths) if file.is_file())


def listed_images(paths: str | list[str]) -> Iterator[Path]:
    """Yield the images that folders hold or lists name; a file in a list may be missing.

    paths: folders, searched with their subfolders, or text files that list one image per line.
    """
    for path in map(Path, [paths] if isinstance(paths, str) else paths):
        if not path.exists():
            continue
        if path.is_dir():
            # glob follows links to folders, as Ultralytics does; Path.rglob does not.
            files: Iterator[Path] = map(Path, glob.iglob(f"{glob.escape(str(path))}/**/*.*", recursive=True))
        else:
            lines = map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())
            files = (path.parent / line if line.startswith("./") else Path(line) for line in lines)
        yield from (file for file in files if file.suffix[1:].lower() in IMG_FORMATS)


def validation_images(data: str) -> list[Image]:
    """Return up to EXPORT_IMAGES images, spread over the validation split, each (height, width, channels) uint8.

    Three channels are in the order BGR. Downloads nothing. Raises UserError if no image can be read.
    """
    images = _read_images(load_data(data, download=False), EXPORT_IMAGES)
    if not images:
        raise UserError(f"data={data}", "has no readable validation image", "give the .yaml of an existing data set")
    return images


def sample_batch(data: dict[str, Any], imgsz: int) -> Tensor:
    """Return up to PRECISION_IMAGES validation images as a batch (B, channels, imgsz, imgsz) float32 in 0..1.

    data: Ultralytics' dictionary of the data set. Returns random images if none can be read.
    """
    if images := _read_images(data, PRECISION_IMAGES):
        return as_batch(images, (imgsz, imgsz))
    return torch.rand(PRECISION_IMAGES, data["channels"], imgsz, imgsz, generator=torch.Generator().manual_seed(0))


def as_batch(images: Sequence[Image], size: tuple[int, int]) -> Tensor:
    """Letterbox images to a size (height, width); return (B, C, H, W) float32 in 0..1, three channels as RGB."""
    letterbox = LetterBox(size)
    batch = np.stack([letterbox(image=image) for image in images])
    if batch.shape[-1] == 3:
        batch = batch[..., ::-1]
    return torch.from_numpy(batch.transpose(0, 3, 1, 2).copy()).float() / 255


def read_flag(channels: int) -> int:
    """Return the flag with which Ultralytics lets OpenCV read images of so many channels."""
    return {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}.get(channels, cv2.IMREAD_UNCHANGED)


def _read_images(data: Mapping[str, Any], count: int) -> list[Image]:
    """Read up to `count` images, spread over the validation split; skip those of other channels or unreadable."""
    chosen = spread(sorted(split_images(data["val"])), count)
    with no_ghostscript():
        images = [read_image(file, data["channels"]) for file in chosen]
    return [image for image in images if image is not None]


def spread(items: Sequence[T], count: int) -> list[T]:
    """Return up to `count` items, evenly spread over all.

    >>> spread("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    return [items[i * len(items) // count] for i in range(count)] if len(items) > count else list(items)


def read_image(file: Path, channels: int) -> Image | None:
    """Return an image (height, width, channels) uint8, three channels as BGR, as Ultralytics reads it.

    Returns None if it cannot be read or has other channels.
    """
    try:
        image: Image | None = imread(file, read_flag(channels))
    except (cv2.error, MemoryError):  # of an image that claims to have more pixels than OpenCV reads
        return None
    return image if image is not None and image.shape[2:] == (channels,) else None
