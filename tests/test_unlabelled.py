"""Images without labels: found and checked, mixed into batches, seen by the distillation alone."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, attach_criterion, random_detector
from helpers.results import rows
from helpers.runs import captured_log
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.utils.torch_utils import init_seeds

from yolokd import UserError, YoloDistiller
from yolokd.commands.bench import run_bench
from yolokd.commands.check import print_check
from yolokd.data.dataset import load_data
from yolokd.data.mixed import LABELLED, MixedDataset, ShuffledPasses, labelled_count, mix_batches
from yolokd.data.unlabelled import unlabelled_images
from yolokd.training.settings import with_absolute_paths

GREEN, RED = (0, 200, 0), (0, 0, 200)  # BGR
NO_COLORS = {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}


def write_images(folder: Path, count: int, color: tuple[int, int, int]) -> Path:
    """Write images of one color, each of another shade; return their folder."""
    folder.mkdir(parents=True)
    for i in range(count):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((64, 70, 3), [max(v - 8 * i, 0) for v in color], np.uint8))
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of five red images. Beside one of them lies a label file that no label reader would take."""
    folder = write_images(tmp_path / "photos", 5, RED)
    (folder / "3.txt").write_text("no label")
    return folder


def found(source: Path | str, data: str, **settings: Any) -> tuple[list[str], list[str]]:
    """Return the names of the images that `unlabelled=source` adds, and what the log says about them."""
    with captured_log() as lines:
        files = unlabelled_images(str(source), load_data(data), get_cfg(overrides={"data": data, **settings}))
    return [Path(file).name for file in files], [
        line.removeprefix("WARNING ⚠️ ") for line in lines if "unlabelled: " in line
    ]


# Which images


def test_a_folder_a_list_and_a_data_set_name_the_images(photos: Path, data: str, tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(5)]
    lists = tmp_path / "list.txt"
    lists.write_text("\n".join(f"./photos/{name}" for name in names))
    data_file = tmp_path / "d.yaml"
    data_file.write_text(f"train: photos\nval: {Path(data).parent / 'images' / 'val'}\nnames: [thing]\n")
    before = sorted(tmp_path.rglob("*"))
    for source in (photos, tmp_path, lists, data_file):
        assert found(source, data) == (names, [])
    assert sorted(tmp_path.rglob("*")) == before  # no cache of labels


def test_images_that_are_labelled_in_this_training_are_left_out(data: str, photos: Path) -> None:
    labelled = Path(data).parent / "images" / "train"
    shutil.copy(labelled / "7.jpg", photos / "another name.jpg")
    names, log = found(photos, data)
    assert names == [f"{i}.png" for i in range(5)]
    assert log == ["unlabelled: 1 of 6 images have labels in data=, and are left out"]


def test_the_rest_of_a_fraction_can_be_taken_without_labels(data: str) -> None:
    files = sorted((Path(data).parent / "images" / "train").glob("*.jpg"), key=str)
    names, _ = found(data, data, fraction=0.25)
    assert names == [file.name for file in files[3:]]


def test_images_that_score_models_give_a_warning(data: str, photos: Path) -> None:
    shutil.copy(Path(data).parent / "images" / "val" / "2.jpg", photos)
    names, log = found(photos, data)
    assert "2.jpg" in names
    assert log == ["unlabelled: 1 of its images are also in val: scores there are not those on unseen images"]


def test_missing_and_broken_images_are_skipped_with_a_warning(data: str, photos: Path, tmp_path: Path) -> None:
    (photos / "1.png").write_bytes(b"no image")
    lists = tmp_path / "list.txt"
    lists.write_text("\n".join(str(photos / name) for name in ("0.png", "1.png", "missing.png")))
    names, log = found(lists, data)
    assert names == ["0.png"]
    assert len(log) == 1
    assert "2 of 3 images are skipped" in log[0]


def test_images_of_other_channels_than_the_students_are_skipped(photos: Path, data: str, tmp_path: Path) -> None:
    cv2.imwrite(str(photos / "5.png"), np.zeros((64, 70, 4), np.uint8))
    content = yaml.safe_load(Path(data).read_text()) | {"path": str(Path(data).parent), "channels": 4}
    (tmp_path / "four.yaml").write_text(yaml.safe_dump(content))
    names, log = found(photos, str(tmp_path / "four.yaml"))
    assert names == ["5.png"]
    assert "5 of 6 images are skipped: they are missing, broken, or of another number of channels" in log[0]


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"unlabelled": "nowhere"}, "unlabelled=nowhere: is no folder, list or data set that exists"),
        ({"unlabelled": "photos/0.png"}, "is no folder, list or data set that exists"),
        ({"unlabelled": "empty"}, "has no images"),
        ({"unlabelled": "broken"}, "none of its 1 images can be read"),
        ({"unlabelled": "nowhere.yaml"}, "unlabelled=nowhere.yaml: cannot be used"),
        ({"unlabelled": "labelled"}, "all of its images are labelled images"),
        ({"unlabelled": 7}, "unlabelled=7: not a valid value"),
        ({"unlabelled": "photos", "unlabelled_ratio": 0}, "unlabelled_ratio=0: not a valid value"),
        ({"unlabelled": "photos", "unlabelled_ratio": 17.0}, "unlabelled_ratio=17.0: not a valid value"),
        ({"unlabelled_ratio": 2.0}, "unlabelled_ratio: has no effect"),
        ({"unlabelled": "photos", "method": "none"}, "method=none learns from labelled images alone"),
        ({"unlabelled": "photos", "method": "fgd"}, "method=fgd learns from labelled images alone"),
        ({"unlabelled": "photos", "method": "crosskd", "crosskd.alpha": 0.0}, "method=crosskd learns from labelled"),
        ({"unlabelled": "photos", "rect": True}, "rect=True: gives each batch the shape"),
        ({"unlabelled": "photos", "imgsz": 40000, "batch": 60, "unlabelled_ratio": 16.0}, "1020 images in a batch"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    keys: dict[str, Any], why: str, tiny: dict[str, Any], teacher: str, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photos.parent
    monkeypatch.chdir(root)
    (root / "empty").mkdir()
    (root / "broken").mkdir()
    (root / "broken" / "0.jpg").touch()
    (root / "labelled").symlink_to(Path(tiny["data"]).parent / "images" / "train")
    with pytest.raises(UserError, match=why):
        YoloDistiller(teacher=teacher, student=YOLOV8N).train(**tiny | {"method": "fitnet"} | keys)
    assert not Path(tiny["project"]).exists()


def test_bench_refuses_unlabelled_images(teacher: str, photos: Path) -> None:
    with pytest.raises(UserError, match="unlabelled: is not measured"):
        run_bench(teacher=teacher, student=YOLOV8N, unlabelled=str(photos))


def test_a_runs_path_of_unlabelled_images_is_absolute(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    for source in ("photos", Path("photos")):
        assert with_absolute_paths({"unlabelled": source, "data": "photos"}) == {
            "unlabelled": str(photos),
            "data": "photos",
        }


def test_check_says_how_many_there_are(
    tiny: dict[str, Any], teacher: str, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {"teacher": teacher, "student": YOLOV8N, "method": "fitnet", "unlabelled": str(photos)}
    print_check({k: v for k, v in tiny.items() if k != "project"} | keys | {"unlabelled_ratio": 0.5})
    assert "unlabelled images: 5; 2 join the 4 labelled ones of a batch" in capsys.readouterr().out


# Which batches


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_image_comes_up_equally_often_over_all_processes(processes: int) -> None:
    draws = [ShuffledPasses(7, seed=3, rank=rank, processes=processes) for rank in range(processes)]
    drawn = [[next(each).image for each in draws] for _ in range(7 * 4)]
    whole = [index for at_once in drawn for index in at_once]
    passes = [whole[i : i + 7] for i in range(0, len(whole), 7)]
    assert all(sorted(each) == list(range(7)) for each in passes)
    assert len({*map(tuple, passes)}) > 1
    again = ShuffledPasses(7, seed=3, rank=0, processes=processes)
    again.drawn = 5  # as after a resume
    assert [next(again).image for _ in range(9)] == [at_once[0] for at_once in drawn[5:14]]
    other_seed = ShuffledPasses(7, seed=4, rank=0, processes=1)
    assert [next(other_seed).image for _ in range(7)] != whole[:7]


def make_loader(root: Path, unlabelled: bool) -> Any:
    """Return a loader of seven green labelled images under strong augmentations.

    unlabelled: whether five red unlabelled images are mixed in, three for each four labelled ones.
    """
    augmentations = {"mosaic": 0.8, "mixup": 0.5, "cutmix": 0.5, **NO_COLORS}
    args = get_cfg(overrides={"imgsz": 64, "batch": 4, "data": str(root / "d.yaml"), "seed": 1, **augmentations})
    init_seeds(1)
    data = load_data(args.data)
    dataset: Any = build_yolo_dataset(args, data["train"], 4, data)
    if unlabelled:
        dataset = MixedDataset(dataset, sorted(map(str, (root / "photos").iterdir())), args, ratio=0.75)
    loader = build_dataloader(dataset, batch=4, workers=0, device="cpu")
    if unlabelled:
        mix_batches(loader)
    return loader


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with a data set of seven labelled images, and five unlabelled ones."""
    (tmp_path / "labels" / "train").mkdir(parents=True)
    for image in write_images(tmp_path / "images" / "train", 7, GREEN).iterdir():
        (tmp_path / "labels" / "train" / f"{image.stem}.txt").write_text("0 0.5 0.5 0.4 0.4")
    (tmp_path / "d.yaml").write_text(f"path: {tmp_path}\ntrain: images/train\nval: images/train\nnames: [thing]\n")
    write_images(tmp_path / "photos", 5, RED)
    return tmp_path


@pytest.fixture
def loader(root: Path) -> Any:
    return make_loader(root, unlabelled=True)


def test_labelled_images_are_augmented_as_without_unlabelled_ones(root: Path) -> None:
    images: list[list[torch.Tensor]] = []
    for unlabelled in (False, True):
        loader = make_loader(root, unlabelled)
        images.append([batch["img"][: labelled_count(batch)] for _ in range(2) for batch in loader])
    assert all(torch.equal(alone, mixed) for alone, mixed in zip(*images, strict=True))


def test_labelled_images_come_first_and_an_epoch_is_one_pass_over_them(loader: Any) -> None:
    seen: Counter[str] = Counter()
    for _ in range(5):  # epochs of 3 + 2 unlabelled images: five passes over five images
        batches = list(loader)
        assert len(batches) == len(loader) == 2
        assert [batch[LABELLED] for batch in batches] == [(True,) * n + (False,) * m for n, m in ((4, 3), (3, 2))]
        for batch in batches:
            count = sum(batch[LABELLED])
            assert len(batch["img"]) == len(batch["im_file"]) == len(batch[LABELLED])
            assert batch["batch_idx"].max() < count
            assert ["photos" in file for file in batch["im_file"]] == [not labelled for labelled in batch[LABELLED]]
            seen.update(batch["im_file"])
    assert [*seen.values()] == [5] * 12


def shades(image: torch.Tensor, labelled: bool) -> int:
    """Return how many images are in one of the loader's, each of another shade of its color.

    Fail if it holds the other color.
    """
    red, green = image[0].int(), image[1].int()
    own, other = (green, red) if labelled else (red, green)
    assert (other - own).max() <= 1
    _, counts = own[own - other > 100].unique(return_counts=True)  # without padding, which is gray
    return int((counts >= 100).sum())  # fewer pixels may be an image's edge, blended with the padding


def test_no_mosaic_mixup_or_cutmix_mixes_the_two(loader: Any) -> None:
    def all_shades() -> list[tuple[bool, int]]:
        samples = [sample for batch in loader for sample in zip(batch[LABELLED], batch["img"], strict=True)]
        return [(labelled, shades(image, labelled)) for labelled, image in samples]

    mixed = [sample for _ in range(4) for sample in all_shades()]
    for kind in (True, False):
        assert max(count for labelled, count in mixed if labelled is kind) > 1
    loader.dataset.close_mosaic(get_cfg(overrides={"mosaic": 1.0, "mixup": 1.0, **NO_COLORS}))
    loader.reset()
    assert {count for _, count in all_shades()} == {1}


# What learns from them


def mixed_batch() -> dict[str, Any]:
    """Return two labelled and three unlabelled images of noise; one labelled image has no box."""
    torch.manual_seed(0)
    boxes = {"cls": torch.tensor([[0.0], [1.0]]), "bboxes": torch.tensor([[0.4, 0.5, 0.3, 0.4], [0.6, 0.5, 0.5, 0.2]])}
    images = {"img": torch.rand(5, 3, 64, 64), "labelled": (True, True, False, False, False)}
    return {**images, **boxes, "batch_idx": torch.zeros(2)}


def labelled_part(batch: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in batch.items() if k != "labelled"} | {"img": batch["img"][:2]}


@pytest.mark.parametrize("student_yaml", [YOLOV8N, YOLO26N])
def test_the_yolo_loss_sees_labelled_images_alone_and_the_distillation_all(student_yaml: str) -> None:
    student, batch = random_detector(student_yaml), mixed_batch()
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(YOLOV8S, seed=1), student, method="fitnet+fgd", balance="off")
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):  # which would make each image's maps depend on all images
            module.eval()
    images = batch["img"].requires_grad_()
    alone = student.init_criterion()
    expected, expected_items = alone(student(batch["img"][:2]), labelled_part(batch))

    def losses(part: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        criterion.begin_epoch(0, epochs=2, steps=5)
        return criterion(student(part["img"]), part)

    loss, items = losses(batch)
    torch.testing.assert_close(loss[:3], expected)
    torch.testing.assert_close({name: items[name] for name in expected_items}, expected_items)

    of_all = losses({k: v for k, v in batch.items() if k != "labelled"})[1]
    of_labelled = losses(labelled_part(batch))[1]
    torch.testing.assert_close(items["fitnet_loss"], of_all["fitnet_loss"])
    torch.testing.assert_close(items["fgd_loss"], of_labelled["fgd_loss"])
    torch.testing.assert_close(loss[3].detach(), 2 * items["fitnet_gain"] * items["fitnet_loss"])

    (of_task,) = torch.autograd.grad(loss[:3].sum(), images, retain_graph=True)
    (of_fitnet,) = torch.autograd.grad(loss[3], images, retain_graph=True)
    (of_fgd,) = torch.autograd.grad(loss[4], images)
    assert [bool(of_task[i].any()) for i in range(5)] == [True, True, False, False, False]
    assert [bool(of_fitnet[i].any()) for i in range(5)] == [True] * 5
    # To FGD, all of an unlabelled image would be background.
    assert [bool(of_fgd[i].any()) for i in range(5)] == [True, True, False, False, False]


def test_gains_are_balanced_beside_unlabelled_images() -> None:
    student, batch = random_detector(), mixed_batch()
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(YOLOV8S, seed=1), student, method="fitnet", balance=0.5)
    preds = student(batch["img"])
    criterion(preds, batch)
    ratios = [value for name, value in criterion.recorder.means().items() if name.endswith("fitnet_ratio")]
    assert ratios == pytest.approx([0.5] * 3, rel=1e-3)


def test_a_training_takes_unlabelled_images_of_which_it_reads_no_labels(
    tiny: dict[str, Any], teacher: str, photos: Path
) -> None:
    batches: list[Any] = []
    before = sorted(photos.parent.rglob("*"))
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet")

    def watch(trainer: Any) -> None:
        criterion = trainer.criterion
        criterion.register_forward_pre_hook(lambda _, inputs: batches.append(inputs[1]))

    d.add_callback("on_train_start", watch)
    d.train(**tiny | {"epochs": 1, "teacher_precision": "fp32", "unlabelled": photos})
    assert [tuple(batch["labelled"]) for batch in batches] == [(True,) * 4 + (False,) * 4] * 3
    assert [len(batch["img"]) for batch in batches] == [8] * 3
    assert {Path(file).name for batch in batches for file in batch["im_file"][4:]} == {f"{i}.png" for i in range(5)}
    (row,) = rows(d.trainer)
    assert row["train/fitnet_loss"] > 0
    assert d.model.model.yolokd["unlabelled"] == {"images": 5, "ratio": 1.0}
    assert d.trainer.args.unlabelled == str(photos)
    assert sorted(path for path in photos.parent.rglob("*") if "runs" not in path.parts) == before
