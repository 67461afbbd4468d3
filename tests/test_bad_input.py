"""Broken images, labels and data files, odd folders and names: they are skipped with a warning, or refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from helpers.cli import run_forked
from helpers.data import NAMES, write_dataset
from helpers.models import YOLOV8N, YOLOV8S, random_detector, save_checkpoint
from helpers.runs import TINY, captured_log, distil
from PIL import EpsImagePlugin, Image
from ultralytics.data.build import build_yolo_dataset
from ultralytics.utils.patches import imread

from yolokd import UserError, YoloDistiller
from yolokd.commands.compare.identity import fingerprint
from yolokd.data.dataset import check_images, load_data, validation_images
from yolokd.patches.safe_loading import safe_loading
from yolokd.training.plan import check_data, make_plan

LABEL = "0 0.5 0.5 0.3 0.3\n"
GOOD = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)


def encoded(suffix: str, image: np.ndarray = GOOD) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


def saved(path: Path, mode: str = "RGB", **settings: Any) -> None:
    Image.fromarray(GOOD[..., ::-1]).convert(mode).save(path, **settings)


def rotated() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    return exif


USABLE: dict[str, Callable[[Path], Any]] = {
    "deep.png": lambda p: p.write_bytes(encoded(".png", GOOD.astype(np.uint16) * 257)),
    "gray.jpg": lambda p: p.write_bytes(encoded(".jpg", GOOD[..., 0])),
    "deepgray.png": lambda p: p.write_bytes(encoded(".png", GOOD[..., 0].astype(np.uint16) * 257)),
    "cmyk.jpg": lambda p: saved(p, "CMYK"),
    "palette.png": lambda p: saved(p, "P"),
    "alpha.png": lambda p: saved(p, "RGBA"),
    "rotated.jpg": lambda p: saved(p, exif=rotated()),
    "named.jpg but a PNG.jpg": lambda p: p.write_bytes(encoded(".png")),
}
SKIPPED: dict[str, Callable[[Path], Any]] = {
    "empty.jpg": lambda p: p.write_bytes(b""),
    "text.jpg": lambda p: p.write_text("no image"),
    "cut.jpg": lambda p: p.write_bytes(encoded(".jpg")[:-40]),
    "half.png": lambda p: p.write_bytes(encoded(".png")[:900]),
    "half.webp": lambda p: p.write_bytes(encoded(".webp")[:300]),
    "one.png": lambda p: p.write_bytes(encoded(".png", GOOD[:1, :1])),
}
BAD_LABELS = {
    "nan": "0 nan 0.5 0.3 0.3", "infinite": "0 inf 0.5 0.3 0.3", "too large": "0 0.5 0.5 1e309 0.3",
    "an infinite class": "1e309 0.5 0.5 0.3 0.3", "an infinite corner": "0 0.1 0.1 0.2 0.1 0.2 1e309",
    "negative size": "0 0.5 0.5 -0.3 0.3",
    "no such class": "2 0.5 0.5 0.3 0.3", "negative class": "-1 0.5 0.5 0.3 0.3", "half a class": "0.5 0.5 0.5 0.3 0.3",
    "beyond the image": "0 0.5 0.5 3 3", "a word": "disc 0.5 0.5 0.3 0.3", "too short": "0 0.5 0.5",
}  # fmt: skip
USABLE_LABELS = {
    "duplicates": LABEL * 3,
    "nothing": "",
    "no area": "0 0.5 0.5 0 0\n",
    "byte-order mark": "\ufeff" + LABEL,
}


def dataset(root: Path, images: dict[str, Callable[[Path], Any]], labels: dict[str, str], intact: int = 4) -> str:
    """Write a data set and add training images, each with a label, and labels, each with an image."""
    path = write_dataset(root, train=intact)
    for name, write in images.items():
        write(root / "images" / "train" / name)
        (root / "labels" / "train" / f"{Path(name).stem}.txt").write_text(LABEL)
    for name, text in labels.items():
        (root / "images" / "train" / f"{name}.jpg").write_bytes(encoded(".jpg"))
        (root / "labels" / "train" / f"{name}.txt").write_text(text)
    return str(path)


def test_unusual_files_are_used_and_broken_ones_are_skipped_with_a_warning(teacher: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "d", USABLE | SKIPPED, BAD_LABELS | USABLE_LABELS)
    broken = len(SKIPPED) + len(BAD_LABELS)
    total = 4 + len(USABLE) + broken + len(USABLE_LABELS)
    before = {p: p.read_bytes() for p in (tmp_path / "d" / "images").rglob("*.*")}
    distiller = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fgd", check_teacher=False)
    with captured_log() as lines:
        distiller.train(**TINY, data=data, epochs=1, project=str(tmp_path / "runs"))
    assert f"data: {broken} of {total} train images are skipped" in "\n".join(lines)
    assert len(distiller.trainer.train_loader.dataset) == total - broken
    assert all(p.read_bytes() == content for p, content in before.items())


@pytest.mark.parametrize("name", SKIPPED)
def test_a_data_set_of_broken_images_is_refused_before_anything_is_written(
    name: str, teacher: str, tmp_path: Path
) -> None:
    data = dataset(tmp_path / "d", {name: SKIPPED[name]}, {}, intact=0)
    assert_refused(teacher, data, tmp_path, "its train split: No valid images found")


@pytest.mark.parametrize("name", BAD_LABELS)
def test_a_data_set_of_broken_labels_is_refused(name: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "d", {}, {name: BAD_LABELS[name]}, intact=0)
    plan = make_plan({"data": data, "method": "none", "model": YOLOV8N})
    with pytest.raises(UserError, match="No valid images found"):
        check_images(plan.data, plan.args)


def test_images_whose_label_files_are_missing_are_counted(tmp_path: Path) -> None:
    data = dataset(tmp_path / "d", {}, {"nothing": ""})  # an empty file is meant so
    labels = tmp_path / "d" / "labels"
    for file in (*sorted((labels / "train").glob("[0-2].txt")), labels / "val" / "0.txt"):
        file.unlink()
    for _ in ("scanned", "from the cache"):
        with captured_log() as lines:
            check_data(make_plan({"data": data, "method": "none", "model": YOLOV8N}))
        assert [line for line in lines if "no label file" in line] == [
            "data: 3 of 5 train images have no label file and count as background",
            "data: 1 of 6 val images have no label file and count as background",
        ]


class Touch:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def odd_names(tmp_path: Path) -> str:
    """Write a data set whose first image of each split has a name that is not UTF-8; return the path of its .yaml."""
    path = write_dataset(tmp_path / "odd")
    for split in ("train", "val"):
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            file = tmp_path / "odd" / kind / split / f"0.{suffix}"
            file.rename(file.with_stem(os.fsdecode(b"bad \xff")))
    return str(path)


def test_images_whose_names_are_not_utf_8_are_trained_on(odd_names: str, teacher: str, tmp_path: Path) -> None:
    distiller = distil(
        teacher,
        YOLOV8N,
        TINY,
        "fitnet",
        data=odd_names,
        epochs=1,
        check_teacher=False,
        save_dir=tmp_path / "run",
    )
    files = distiller.trainer.train_loader.dataset.im_files
    assert len(files) == 12
    assert any(b"\xff" in os.fsencode(file) for file in files)
    assert fingerprint(load_data(odd_names), "train", "val") != fingerprint(load_data(odd_names), "train")


def test_predictions_are_saved_for_an_image_whose_name_is_not_utf_8(
    odd_names: str, teacher: str, tmp_path: Path
) -> None:
    arguments = [f"model={teacher}", f"source={Path(odd_names).parent / 'images' / 'val'}", "imgsz=64", "save_txt=True"]
    arguments += ["conf=0.0001", "device=cpu", f"project={tmp_path / 'runs'}", "name=p"]
    done = run_forked("predict", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert r"bad \udcff.jpg: 64x64" in done.stdout
    assert (tmp_path / "runs" / "p" / os.fsdecode(b"bad \xff.jpg")).exists()
    assert len(list((tmp_path / "runs" / "p" / "labels").iterdir())) == 6


def test_an_image_that_is_a_program_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would run Ghostscript on PostScript, whatever the file's name; here, a script stands for Ghostscript."""
    ran, path = tmp_path / "ran", write_dataset(tmp_path / "d")
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    for split in ("train", "val"):
        script = tmp_path / "d" / "images" / split / "script.avif"
        script.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n%%EOF\n")
    plan = make_plan({"data": str(path), "method": "none", "model": YOLOV8N})
    assert check_images(plan.data, plan.args) == 12
    assert len(validation_images(str(path))) == 6
    with safe_loading():
        assert imread(script) is None
    assert not ran.exists()
    assert imread(script) is None
    assert ran.exists()  # Pillow did run it


def test_a_pickle_in_place_of_a_cached_image_does_not_run(tmp_path: Path) -> None:
    """Ultralytics reads `0.npy` beside `0.jpg` if it is there (`cache=disk` writes it)."""
    plan = make_plan({"data": str(write_dataset(tmp_path / "d")), "method": "none", "model": YOLOV8N})
    cached = tmp_path / "d" / "images" / "train" / "0.npy"
    np.save(cached, np.array(Touch(tmp_path / "ran"), object))
    images = build_yolo_dataset(plan.args, plan.data["train"], 1, plan.data)
    assert images.load_image(0)[0].shape[2] == 3
    assert not cached.exists()  # it was read, and removed as broken
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_check_images_counts_the_images_that_training_uses(split: str, tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d", train=8)
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "test": "images/val"}))
    keys = {"data": str(path), "method": "none", "model": YOLOV8N, "split": split}
    for changes, images in ({}, 8), ({"fraction": 0.5}, 4), ({"fraction": 3}, 3), ({"single_cls": True}, 8):
        plan = make_plan(keys | changes)
        assert check_images(plan.data, plan.args) == images


def test_images_without_labels_are_refused(teacher: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "d", {}, {"nothing": ""}, intact=0)
    assert_refused(teacher, data, tmp_path, "its training images have no labels")


def test_a_truncated_image_that_the_scan_accepts_is_refused(teacher: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "d", {"half.bmp": lambda p: p.write_bytes(encoded(".bmp")[:3000])}, {})
    assert_refused(teacher, data, tmp_path, "half.bmp")


def assert_refused(teacher: str, data: str, folder: Path, problem: str) -> None:
    runs = folder / "runs"
    with pytest.raises(UserError) as caught:
        YoloDistiller(teacher=teacher, student=YOLOV8N).train(**TINY, data=data, project=str(runs))
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not runs.exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"names": {0: "disc", 1: "Disc "}}, "two classes are called 'disc'"),
        ({"nc": 3}, "must match"),
        ({"nc": 1}, "must match"),
        ({"names": {0: "disc", 5: "box"}}, "cannot be used"),
        ({"names": []}, "cannot be used"),
        ({"names": {0: "disc", -1: "box"}}, "its names: must count 2 classes from 0, without a gap"),
        ({"names": {"0": "disc", 0: "box"}}, "has 2 classes, but 1 names"),
        ({"names": list(range(10**5))}, "its names: Dictionary should have at most 10000 items"),
        ({"channels": 4}, "takes 3 channels, the data 4"),
        ({"val": "nowhere"}, "missing path"),
        ({"train": "nowhere"}, "no images in its train split"),
        ({"train": 3}, "cannot be used"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_contradictory_data_files_are_refused(
    change: dict[str, Any], problem: str, teacher: str, tmp_path: Path
) -> None:
    path = write_dataset(tmp_path / "d")
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    assert_refused(teacher, str(path), tmp_path, problem)


def test_a_class_name_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "d")
    path.write_text(path.read_text().replace("disc", r'"\udcff"'))
    with pytest.raises(UserError, match="cannot be used: YAML syntax error"):
        load_data(str(path))


@pytest.mark.parametrize("download", ["open({written!r}, 'w').close()", "bash -c touch {written}"])
def test_code_in_a_data_file_runs_only_with_trust(download: str, tmp_path: Path) -> None:
    path, written = tmp_path / "data.yaml", tmp_path / "written"
    script = download.format(written=str(written))
    path.write_text(yaml.safe_dump({"train": "nowhere", "val": "nowhere", "names": NAMES, "download": script}))
    with pytest.raises(UserError, match="its download: is code"):
        load_data(str(path))
    assert not written.exists()
    if not download.startswith("bash"):
        with pytest.raises(UserError, match="no images in its train split"):  # the code ran, and downloaded no images
            load_data(str(path), trust=True)
        assert written.exists()


def test_code_in_the_data_files_of_ultralytics_runs_without_trust(tmp_path: Path) -> None:
    from ultralytics.data import utils
    from ultralytics.utils import ROOT

    scope = {"yaml": {"yaml_file": str(ROOT / "cfg" / "datasets" / "VOC.yaml")}}
    with safe_loading(trust=False):
        utils.exec("yaml['ran'] = True", scope)
    assert scope["yaml"]["ran"] is True
    assert "exec" not in vars(utils)


SHELL_CODE = "größe 数据; touch pwned & $(touch pwned) `touch pwned`"


def test_shell_code_in_names_of_files_and_classes_does_not_run(tmp_path: Path) -> None:
    home = tmp_path / SHELL_CODE
    home.mkdir()
    names = {0: "$(touch pwned)", 1: "数据; touch pwned"}
    data = write_dataset(home / "set", names=names)
    teacher = save_checkpoint(random_detector(YOLOV8S, names=names, seed=1), home / "teacher ü.pt")
    student = save_checkpoint(random_detector(YOLOV8N, names=names, seed=2), home / "student ü.pt")
    arguments = [
        f"teacher={teacher}",
        f"student={student}",
        f"data={data}",
        f"project={home / 'runs'}",
        "name=run ü;touch pwned",
    ]
    arguments += ["epochs=1", "imgsz=64", "batch=4", "device=cpu", "plots=False", "report=False"]
    done = run_forked("train", *arguments, cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    best = home / "runs" / "run ü;touch pwned" / "weights" / "best.pt"
    assert best.exists()
    done = run_forked("export", f"model={best}", f"data={data}", "imgsz=64", "device=cpu", cwd=home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert best.with_suffix(".onnx").exists()
    assert not list(tmp_path.rglob("pwned"))
    assert not Path("pwned").exists()


def test_a_path_with_an_apostrophe_is_refused(teacher: str, data: str, tmp_path: Path) -> None:
    """Ultralytics drops apostrophes from paths, and would read or write elsewhere."""
    home = tmp_path / "Ann's"
    home.mkdir()
    moved = home / "teacher.pt"
    moved.write_bytes(Path(teacher).read_bytes())
    common = [f"data={data}", "epochs=1", "imgsz=64", "batch=4", "device=cpu"]
    for arguments in ([f"teacher={moved}"], [f"teacher={teacher}", f"project={home / 'runs'}"]):
        done = run_forked("train", *arguments, *common, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert "holds an apostrophe, which Ultralytics drops" in done.stderr
    assert [p.name for p in home.iterdir()] == ["teacher.pt"]


def test_a_folder_that_cannot_be_written_gives_one_line_of_error(teacher: str, data: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    for project in (tmp_path / "file" / "runs", Path("/proc/runs") if os.geteuid() == 0 else locked / "runs"):
        arguments = [f"teacher={teacher}", f"data={data}", f"project={project}", "epochs=1", "imgsz=64", "batch=4"]
        done = run_forked("train", *arguments, "device=cpu", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("yolokd: error: ")]
        assert len(errors) == 1
        assert "give a folder that can be written" in errors[0]
        assert str(project) in errors[0]


def test_a_missing_image_stops_the_training_with_an_error_that_says_how_to_resume(teacher: str, tmp_path: Path) -> None:
    data = dataset(tmp_path / "d", {}, {})
    distiller = YoloDistiller(teacher=teacher, student=YOLOV8N, method="fitnet", check_teacher=False)

    def hide_images(trainer: Any) -> None:
        for path in (tmp_path / "d" / "images" / "train").iterdir():
            path.rename(path.with_suffix(".away"))

    distiller.add_callback("on_model_save", hide_images)
    with pytest.raises(UserError, match=r"Image Not Found .*continue with: yolokd train resume="):
        distiller.train(**TINY, data=data, epochs=2, project=str(tmp_path / "runs"))
    for path in (tmp_path / "d" / "images" / "train").iterdir():
        path.rename(path.with_suffix(".jpg"))
    YoloDistiller().train(resume=distiller.trainer.save_dir)
