"""The training images that an INT8 file is calibrated on."""

from __future__ import annotations

from pathlib import Path

import yaml
from ultralytics.data.utils import img2label_paths

from yolokd.data.dataset import load_data, split_images, spread

CALIBRATION_IMAGES = 300  # as many as Ultralytics recommends


def write_calibration_set(data: str, folder: Path) -> Path:
    """Write a data set of up to CALIBRATION_IMAGES images, spread over the training split of `data`.

    Returns its .yaml, in `folder`. It holds links, so that Ultralytics writes no label cache beside the user's labels:
    the cache of a few images would replace that of all.
    """
    content, root = load_data(data, download=False), folder.absolute()
    for kind in ("images", "labels"):
        (root / kind).mkdir()
    images = spread(sorted(split_images(content["train"])), CALIBRATION_IMAGES)
    labels = map(Path, img2label_paths([str(image) for image in images]))
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (root / "images" / f"{number}{image.suffix}").symlink_to(image.absolute())
        if label.is_file():
            (root / "labels" / f"{number}.txt").symlink_to(label.absolute())
    path = root / "data.yaml"
    described = {"path": str(root), "train": "images", "val": "images", "names": dict(content["names"])}
    described |= {key: content[key] for key in ("channels", "kpt_shape") if key in content}
    path.write_text(yaml.safe_dump(described), encoding="utf-8")
    return path
