"""The images of `unlabelled=`: found, checked, and told apart from those of the data set."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from ultralytics.data.build import build_yolo_dataset
from ultralytics.data.utils import verify_image
from ultralytics.utils import LOGGER, NUM_THREADS

from yolokd.data.dataset import read_flag, read_image, split_images, uncached, undecodable_bitmaps
from yolokd.data.sources import read_source
from yolokd.errors import UserError
from yolokd.patches.safe_loading import safe_loading
from yolokd.runtime.files import sha256

SCORING_SPLITS = ("val", "test")


def unlabelled_images(source: str, data: dict[str, Any], args: Any, trust: bool = False) -> tuple[str, ...]:
    """Return the absolute paths of the images that `unlabelled=source` adds to a training, in the order of their names.

    source: a folder, searched with its subfolders; a text file that lists one image per line; or the .yaml of a data
    set, whose training images are taken. data: the labelled data set, as Ultralytics' dictionary. args: Ultralytics'
    settings of the training. Labels are not looked for, and nothing is written beside the images.
    Images that cannot be read, and copies of images that are labelled in this training, are left out. Copies of images
    that score a model stay, with a warning. The log gives the number of each.
    Raises UserError if there is no such source, or if no image is left.
    """
    argument = f"unlabelled={source}"
    with safe_loading(trust):
        found = [str(image) for image in read_source("unlabelled", source, trust=trust).images]
        files = _readable(argument, found, data["channels"])
        labelled = build_yolo_dataset(uncached(args), data["train"], 1, dict(data), mode="train").im_files
    known = copies(files, labelled)
    if len(known) == len(files):
        raise UserError(argument, "all of its images are labelled images of data=", "give other images")
    if known:
        LOGGER.info(f"unlabelled: {len(known)} of {len(files)} images have labels in data=, and are left out")
    left = [file for file in files if file not in known]
    for split in SCORING_SPLITS:
        if leaked := copies(left, map(str, split_images(data.get(split) or []))):
            where = f"{len(leaked)} of its images are also in {split}"
            LOGGER.warning(f"unlabelled: {where}: scores there are not those on unseen images")
    return tuple(left)


def _readable(argument: str, files: Sequence[str], channels: int) -> list[str]:
    """Return the files that Ultralytics can read as images of so many channels; warn if there are others."""
    with ThreadPool(NUM_THREADS) as pool:
        results = pool.imap(verify_image, (((file, None), "unlabelled: ") for file in files))
        valid = [file for (file, _), found, _, _ in results if found]
    broken = {*undecodable_bitmaps(valid, read_flag(channels))}
    valid = [file for file in valid if file not in broken]
    if channels not in (1, 3):  # OpenCV converts others to these two alone
        with ThreadPool(NUM_THREADS) as pool:
            images = pool.imap(lambda file: read_image(Path(file), channels), valid)
            valid = [file for file, image in zip(valid, images, strict=True) if image is not None]
    if not valid:
        problem = f"none of its {len(files)} images can be read as one of {channels} channels"
        raise UserError(argument, problem, "repair them, or give others")
    if skipped := sorted({*files} - {*valid}):
        counts = f"{len(skipped)} of {len(files)} images are skipped"
        reasons = "missing, broken, or of another number of channels" if channels not in (1, 3) else "missing or broken"
        LOGGER.warning(f"unlabelled: {counts}: they are {reasons}, such as {skipped[0]}")
    return valid


def copies(files: Iterable[str], originals: Iterable[str]) -> set[str]:
    """Return those of `files` whose content is that of one of `originals`; only files of equal sizes are read."""
    sizes = {file: os.path.getsize(file) for file in files}
    of_size: dict[int, list[str]] = {}
    for original in originals:
        of_size.setdefault(os.path.getsize(original), []).append(original)
    candidates = {file: size for file, size in sizes.items() if size in of_size}
    hashes = {sha256(original) for size in {*candidates.values()} for original in of_size[size]}
    return {file for file in candidates if sha256(file) in hashes}
