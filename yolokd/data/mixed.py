"""Batches of labelled and unlabelled images, the labelled ones first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from ultralytics.data.dataset import YOLODataset
from ultralytics.utils import RANK

from yolokd.runtime.distributed import WORLD_SIZE
from yolokd.runtime.rng import seeded

LABELLED = "labelled"  # a batch's key: for each image, whether it has labels


def labelled_count(batch: Mapping[str, Any]) -> int:
    """Return how many images of a batch have labels: all of them, unless the data set is a MixedDataset."""
    return sum(batch[LABELLED]) if LABELLED in batch else len(batch["img"])


def unlabelled_count(labelled: int, ratio: float) -> int:
    """Return how many unlabelled images join `labelled` labelled ones in a batch: `ratio` times as many, at least one.

    >>> [unlabelled_count(16, ratio) for ratio in (1.0, 0.5, 0.01)]
    [16, 8, 1]
    """
    return max(1, round(labelled * ratio))


class UnlabelledDataset(YOLODataset):
    """Ultralytics' data set of images without labels: it reads and writes no label files.

    img_path: the image files, checked already.
    """

    def get_img_files(self, img_path: Sequence[str]) -> list[str]:
        """Return the image files as they are given; `fraction` is of the labelled images."""
        return list(img_path)

    def get_labels(self) -> list[dict[str, Any]]:
        """Return Ultralytics' label of each image, without boxes."""
        keypoints = np.zeros((0, *self.data["kpt_shape"]), dtype=np.float32) if self.use_keypoints else None
        return [
            {
                "im_file": file,
                "cls": np.zeros((0, 1), dtype=np.float32),
                "bboxes": np.zeros((0, 4), dtype=np.float32),
                "segments": [],
                "keypoints": keypoints,
                "normalized": True,
                "bbox_format": "xywh",
            }
            for file in self.im_files
        ]


class Draw(NamedTuple):
    """An unlabelled image that is drawn: its index among all of them, and the number of the draw over all processes."""

    image: int
    number: int


class ShuffledPasses:
    """An endless sequence of draws of `images` images: one shuffled pass over all of them after another.

    Several processes share one sequence: with n of them, each takes every n-th draw. The order of a pass follows from
    the seed and the pass's number alone, so `drawn`, how many draws this process has made, is all that a resume needs.
    """

    def __init__(self, images: int, seed: int, rank: int, processes: int) -> None:
        self._images, self._seed = images, seed
        self._rank, self._processes = rank, processes
        self._pass, self._order = -1, torch.empty(0, dtype=torch.int64)  # the number and order of the present pass
        self.drawn = 0

    def __iter__(self) -> Iterator[Draw]:
        return self

    def __next__(self) -> Draw:
        number = self.drawn * self._processes + self._rank
        this_pass, place = divmod(number, self._images)
        if this_pass != self._pass:
            generator = torch.Generator().manual_seed(hash((self._seed, this_pass)) % 2**63)
            self._pass, self._order = this_pass, torch.randperm(self._images, generator=generator)
        self.drawn += 1
        return Draw(int(self._order[place]), number)


class MixedDataset(Dataset[dict[str, Any]]):
    """Labelled images, and behind them unlabelled ones.

    Its length is the number of labelled images, so that an epoch is one pass over these; `im_files` and `labels` are
    those of both. Each part has its own buffer of images for mosaics, so that no mosaic, mixup or cutmix takes images
    of both. The augmentations of an unlabelled image are seeded by its draw: those of the labelled images are the same
    with and without unlabelled ones, so that the two trainings can be compared seed by seed.

    labelled: Ultralytics' data set of the labelled images alone. draws: the unlabelled images that come next. ratio:
    unlabelled images for each labelled one of a batch.
    """

    def __init__(self, labelled: Any, files: Sequence[str], hyp: Any, ratio: float) -> None:
        """Add unlabelled images to Ultralytics' data set of a training. hyp: Ultralytics' settings."""
        self.labelled, self.ratio, self._seed = labelled, ratio, hyp.seed
        with seeded(self._seed):  # a cache of images looks at some by chance
            self._unlabelled = UnlabelledDataset(
                img_path=files,
                imgsz=labelled.imgsz,
                batch_size=unlabelled_count(labelled.batch_size, ratio),
                augment=True,
                hyp=hyp,
                cache=hyp.cache or None,
                stride=labelled.stride,
                pad=labelled.pad,
                prefix="unlabelled: ",
                task=hyp.task,
                data=labelled.data,
            )
        self.draws = ShuffledPasses(len(self._unlabelled), hyp.seed, max(RANK, 0), WORLD_SIZE)
        self.im_files = [*labelled.im_files, *self._unlabelled.im_files]
        self.labels = [*labelled.labels, *self._unlabelled.labels]
        self.collate_fn = labelled.collate_fn

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, item: int | Draw) -> dict[str, Any]:
        """Return a sample of Ultralytics' data sets: of the labelled image of an index, or of an unlabelled one."""
        if isinstance(item, Draw):
            with seeded(hash((self._seed, item.number))):
                return {**self._unlabelled[item.image], LABELLED: False}
        return {**self.labelled[item], LABELLED: True}

    @property
    def buffer(self) -> list[int]:
        """Return the places in `im_files` of the images that both parts keep for mosaics, oldest first."""
        return [*self.labelled.buffer, *(len(self) + index for index in self._unlabelled.buffer)]

    def load_image(self, place: int) -> Any:
        """Load an image, named by its place in `im_files`, into the buffer of its part."""
        count = len(self)
        return self.labelled.load_image(place) if place < count else self._unlabelled.load_image(place - count)

    def close_mosaic(self, hyp: Any) -> None:
        """End the augmentations that take several images. hyp: Ultralytics' settings."""
        for part in (self.labelled, self._unlabelled):
            part.close_mosaic(copy(hyp))  # which changes its argument


class MixedBatches:
    """Yields what each batch of a MixedDataset holds: indices of labelled images, then draws of unlabelled ones.

    labelled: torch's sampler of batches of labelled images.
    """

    def __init__(self, labelled: Any, dataset: MixedDataset) -> None:
        self._labelled, self._dataset = labelled, dataset

    def __len__(self) -> int:
        return len(self._labelled)

    def __iter__(self) -> Iterator[list[int | Draw]]:
        for batch in self._labelled:
            count = unlabelled_count(len(batch), self._dataset.ratio)
            yield [*batch, *islice(self._dataset.draws, count)]


def mix_batches(loader: Any) -> None:
    """Let Ultralytics' loader of a MixedDataset add unlabelled images to each batch; its length stays as it is."""
    endless = loader.batch_sampler  # Ultralytics repeats the sampler of batches without end
    mixed = type(endless)(MixedBatches(endless.sampler, loader.dataset))
    object.__setattr__(loader, "batch_sampler", mixed)  # as Ultralytics itself does: torch forbids plain assignment
