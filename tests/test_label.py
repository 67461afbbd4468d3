"""`yolokd label`: a teacher's detections as a data set, whole after a kill, beside nothing that was there before."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import yaml
from helpers.cli import run_forked, run_yolokd
from helpers.data import NAMES, write_dataset
from helpers.kills import run_until_killed
from helpers.models import YOLOV8N, calibrated_detector, random_detector, save_checkpoint, save_trained_checkpoint
from helpers.runs import TINY, train_plainly
from ultralytics import YOLO
from ultralytics.nn.tasks import OBBModel
from ultralytics.utils import DEFAULT_CFG_DICT

from yolokd import UserError
from yolokd.commands.label import run_label
from yolokd.commands.label.settings import DetectionSettings

SIZE = 96


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make a data set and a teacher that detects a few things in it."""
    root = tmp_path_factory.mktemp("files")
    data = write_dataset(root / "d", train=9, val=3)
    images = [cv2.imread(str(file)) for file in sorted((root / "d" / "images" / "val").iterdir())]
    model = calibrated_detector(YOLOV8N, images, SIZE)
    teacher = save_trained_checkpoint(model, str(data), root / "teacher.pt")
    return {"teacher": str(teacher), "data": str(data), "images": str(root / "d" / "images")}


@pytest.fixture
def keys(files: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    source = f"{files['images']}/train"
    project = str(tmp_path / "labelled")
    return {"teacher": files["teacher"], "source": source, "conf": 0.25, "device": "cpu", "batch": 4} | {
        "project": project
    }


def content(folder: Path) -> dict[str, bytes]:
    """Return what a folder's files hold, by their paths in it; the targets of links; without locks and pictures."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in files
        if path.suffix not in {".lock", ".png"}
    }


def times(folder: Path) -> dict[Path, int]:
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def predicted(teacher: str, image: Path, **settings: Any) -> np.ndarray:
    """Return class, center, width and height of what Ultralytics detects in an image, (n, 5)."""
    boxes = YOLO(teacher).predict(image, conf=0.25, verbose=False, device="cpu", **settings)[0].boxes
    return np.column_stack([boxes.cls.numpy(), boxes.xywhn.numpy()])


def labels(file: Path) -> np.ndarray:
    return np.loadtxt(file, ndmin=2).reshape(-1, 5)


def mixed_source(files: dict[str, str], folder: Path) -> Path:
    """Make a folder with names that repeat, an image that is none, and an odd name."""
    found = sorted(Path(files["images"], "val").iterdir())
    for name, image in zip(("a/x.jpg", "b/x.jpg", "b/st*r [1].jpg"), found, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(image, folder / name)
    cv2.imwrite(str(folder / "a" / "x.png"), cv2.imread(str(found[1])))
    (folder / "broken.jpg").write_bytes(b"no image")
    return folder


def test_a_labelled_data_set_holds_what_the_teacher_detects_and_trains_a_student(
    files: dict[str, str], tmp_path: Path
) -> None:
    source = mixed_source(files, tmp_path / "source")
    before = times(source)
    done = run_yolokd(
        "label", f"teacher={files['teacher']}", "source=source", "conf=0.25", "device=cpu", f"val={files['data']}",
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    root = tmp_path / "runs" / "label" / "source"
    places = {"a/x.jpg": "a/x.jpg", "a/x.png": "a/x-png.png", "b/x.jpg": "b/x.jpg", "b/st*r [1].jpg": "b/st*r [1].jpg"}
    counts = 0
    for name, place in places.items():
        assert os.readlink(root / "images" / place) == str(source / name)
        found = labels(root / "labels" / Path(place).with_suffix(".txt"))
        image = cv2.imread(str(source / name))
        np.testing.assert_allclose(found, predicted(files["teacher"], image, imgsz=160), atol=1e-5)
        counts += len(found)
    assert counts > 0
    assert not list(root.rglob("broken*"))
    assert "left out, cannot be read: " + str(source / "broken.jpg") in done.stdout
    assert "labels of 4 images" in done.stdout
    assert "1 images cannot be read: they are left out" in done.stdout
    data = yaml.safe_load((root / "data.yaml").read_text())
    validation = str(Path(files["images"], "val"))
    assert data == {"train": "images", "val": validation, "channels": 3, "names": NAMES}
    assert cv2.imread(str(root / "sample.png")) is not None
    assert times(source) == before
    trainer = train_plainly(YOLOV8N, TINY, data=str(root / "data.yaml"), project=str(tmp_path / "t"), epochs=1)
    seen = {Path(label["im_file"]).name: len(label["cls"]) for label in trainer.train_loader.dataset.labels}
    assert seen.keys() == {Path(place).name for place in places.values()}
    assert sum(len(label["cls"]) for label in trainer.train_loader.dataset.labels) == counts


def test_a_killed_labelling_goes_on_and_ends_as_one_that_was_not(keys: dict[str, Any], tmp_path: Path) -> None:
    run_label(**keys, name="whole")
    whole = content(tmp_path / "labelled" / "whole")
    assert len(whole) == 9 + 9 + 2
    for number in (2, 33, 60):
        folder = tmp_path / "labelled" / str(number)
        killed = run_until_killed(partial(run_label, **keys, name=str(number)), number=number)
        assert killed == -signal.SIGKILL
        assert not (folder / "data.yaml").exists()
        done = {path: at for path, at in times(folder).items() if path.parent.name in {"labels", "images"}}
        run_label(**keys, name=str(number))
        assert content(folder) == whole
        after = times(folder)
        assert {path: after[path] for path in done if not path.name.endswith(".tmp")} == {
            path: at for path, at in done.items() if not path.name.endswith(".tmp")
        }


def test_ctrl_c_says_that_the_same_command_goes_on(files: dict[str, str], tmp_path: Path) -> None:
    source = tmp_path / "many"
    source.mkdir()
    image = sorted(Path(files["images"], "train").iterdir())[0]
    for i in range(400):
        (source / f"{i}.jpg").symlink_to(image)
    command = [f"teacher={files['teacher']}", "source=many", "conf=0.25", "device=cpu", "batch=1"]
    with subprocess.Popen(
        [sys.executable, "-m", "yolokd", "label", *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background processes ignore it
    ) as process:  # fmt: skip
        folder, deadline = tmp_path / "runs" / "label" / "many", time.monotonic() + 100
        while not list(folder.glob("labels/*.txt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT
    assert errors.splitlines()[-1] == "yolokd: interrupted; repeat the same command to continue"
    begun = len(list(folder.glob("labels/*.txt")))
    assert 0 < begun < 400
    done = run_forked("label", *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(folder.glob("labels/*.txt"))) == 400


def test_a_complete_data_set_is_left_as_it_is(keys: dict[str, Any], tmp_path: Path) -> None:
    path = run_label(**keys)
    assert path == tmp_path / "labelled" / "train" / "data.yaml"
    before = times(path.parent)
    assert run_label(**keys) == path
    assert times(path.parent) == before


OTHER = {
    "conf": ({"conf": 0.5}, r"name=train: was begun with other settings \(conf: 0.25 then, 0.5 now\)"),
    "iou": ({"iou": 0.5}, r"iou: 0.7 then, 0.5 now"),
    "classes": ({"classes": 1}, r"classes: None then, \[1\] now"),
    "imgsz": ({"imgsz": 64}, r"imgsz: None then, 64 now"),
    "copy": ({"copy": True}, r"copy: False then, True now"),
    "val": ({"val": "{data}"}, r"val: images then, .*/images/val now"),
    "source": ({"source": "{images}/val", "name": "train"}, r"images: 9, \w+ then, 3, \w+ now"),
}


@pytest.fixture(scope="module")
def begun(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Label the training images, and return the keys."""
    project = str(tmp_path_factory.mktemp("begun"))
    keys = {"teacher": files["teacher"], "source": f"{files['images']}/train", "conf": 0.25, "device": "cpu"}
    run_label(**keys, project=project)
    return {**keys, "project": project}


@pytest.mark.parametrize("case", OTHER)
def test_a_labelling_with_other_settings_is_refused(case: str, begun: dict[str, Any], files: dict[str, str]) -> None:
    changes, problem = OTHER[case]
    changed = {k: v.format(**files) if isinstance(v, str) else v for k, v in changes.items()}
    before = times(Path(begun["project"]))
    with pytest.raises(UserError, match=problem):
        run_label(**begun | changed)
    assert times(Path(begun["project"])) == before


def test_another_teacher_is_refused(begun: dict[str, Any], tmp_path: Path) -> None:
    other = save_checkpoint(random_detector(YOLOV8N, seed=9), tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"was begun with other settings \(teacher: \w+ then, \w+ now\)"):
        run_label(**begun | {"teacher": str(other)})


WRONG = {
    "no teacher": ({"teacher": None}, "teacher: is missing"),
    "no source": ({"source": None}, "source: is missing"),
    "unknown key": ({"cnof": 0.4}, r"cnof: unknown key \(did you mean conf\?\)"),
    "conf": ({"conf": 2}, "conf=2: not a valid value"),
    "source": ({"source": "nothere"}, "source=nothere: is no folder, list or data set that exists"),
    "source is an image": ({"source": "{images}/val/0.jpg"}, "is no folder, list or data set"),
    "source without images": ({"source": "{tmp}"}, "has no images"),
    "split of a folder": ({"split": "val"}, r"split=val: is no split of the source \(drop it\)"),
    "unknown class": ({"classes": (0, 2)}, r"classes=\[0, 2\]: the teacher has no class 2 \(give 0 to 1\)"),
    "val of other classes": ({"val": "{tmp}/other/data.yaml"}, "its classes are not the teacher's, disc, box"),
    "device": ({"device": "7"}, "device=7"),
    "rotated boxes": ({"teacher": "{tmp}/obb.pt"}, "detects rotated boxes"),
    "no checkpoint": ({"teacher": "{tmp}/text.pt"}, "holds objects other than a known model"),
    "a folder of something else": ({"project": "{tmp}", "name": "other"}, "name=other: .* holds something else"),
    "a record of something else": ({"project": "{tmp}", "name": "record"}, "its label.yaml is none of yolokd's"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_written(
    case: str, keys: dict[str, Any], files: dict[str, str], tmp_path: Path
) -> None:
    changes, problem = WRONG[case]
    write_dataset(tmp_path / "other", {0: "box", 1: "disc"}, train=1, val=1)
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "label.yaml").write_text("- 1\n")
    (tmp_path / "text.pt").write_text("no checkpoint")
    if case == "rotated boxes":
        save_checkpoint(OBBModel("yolov8n-obb.yaml", nc=2, verbose=False), tmp_path / "obb.pt")
    if case == "source without images":
        shutil.rmtree(tmp_path / "other")
    texts = files | {"tmp": str(tmp_path)}
    changed = {k: v.format(**texts) if isinstance(v, str) else v for k, v in changes.items()}
    before = content(tmp_path)
    with pytest.raises(UserError, match=problem) as error:
        run_label(**keys | changed)
    assert "\n" not in str(error.value)
    assert content(tmp_path) == before


def test_a_link_in_the_folder_leads_nothing_out_of_it(keys: dict[str, Any], tmp_path: Path) -> None:
    killed = run_until_killed(partial(run_label, **keys), number=14)
    assert killed == -signal.SIGKILL
    folder, outside = tmp_path / "labelled" / "train", tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(folder / "labels")
    (folder / "labels").symlink_to(outside)
    with pytest.raises(UserError, match="its labels is a link"):
        run_label(**keys)
    assert not list(outside.iterdir())


def test_copies_are_files_of_their_own(keys: dict[str, Any]) -> None:
    folder = run_label(**keys, copy=True).parent
    for image in Path(keys["source"]).iterdir():
        copied = folder / "images" / image.name
        assert not copied.is_symlink()
        assert copied.read_bytes() == image.read_bytes()
        assert copied.stat().st_ino != image.stat().st_ino


def test_a_list_may_name_images_anywhere_and_those_that_are_gone_are_named(
    keys: dict[str, Any], files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(files["images"])
    listed = [images / "train" / "0.jpg", images / "val" / "0.jpg", images / "val" / "gone.jpg", images / "val/0.jpg"]
    (tmp_path / "some.txt").write_text("\n".join(map(str, listed)))
    folder = run_label(**keys | {"source": str(tmp_path / "some.txt")}).parent
    assert folder.name == "some"
    assert f"left out, cannot be read: {images / 'val' / 'gone.jpg'}" in capsys.readouterr().out
    assert sorted(str(p.relative_to(folder / "labels")) for p in folder.rglob("*.txt")) == ["train/0.txt", "val/0.txt"]


def test_a_data_set_gives_its_split_and_its_own_validation_images(
    keys: dict[str, Any], files: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    data_file = run_label(**keys | {"source": files["data"], "split": "val"})
    assert len(list(data_file.parent.glob("images/*.jpg"))) == 3
    assert yaml.safe_load(data_file.read_text())["val"] == f"{files['images']}/val"
    assert "it has 3 of these images, too" in capsys.readouterr().out


def test_a_data_set_without_validation_images_is_labelled(
    keys: dict[str, Any], files: dict[str, str], tmp_path: Path
) -> None:
    data = tmp_path / "d.yaml"
    content = yaml.safe_load(Path(files["data"]).read_text()) | {"path": str(Path(files["data"]).parent), "val": None}
    data.write_text(yaml.safe_dump(content))
    data_file = run_label(**keys | {"source": str(data)})
    assert yaml.safe_load(data_file.read_text())["val"] == "images"


def test_a_folder_may_be_named_by_a_number(
    keys: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(keys["source"], tmp_path / "2024")
    monkeypatch.chdir(tmp_path)
    assert run_label(**keys | {"source": 2024}).parent.name == "2024"


def test_images_that_all_lie_in_the_folder_to_be_written_are_refused(keys: dict[str, Any]) -> None:
    images = run_label(**keys | {"name": "images"}).parent / "images"
    with pytest.raises(UserError, match="all its images lie in"):
        run_label(**keys | {"source": str(images)})


def test_a_source_of_unreadable_images_alone_gives_no_data_set(keys: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="none of its 1 images can be read"):
        run_label(**keys | {"source": str(tmp_path / "broken")})
    assert not list(tmp_path.rglob("data.yaml"))


def test_a_source_that_holds_the_data_set_does_not_label_itself(keys: dict[str, Any], tmp_path: Path) -> None:
    source = tmp_path / "s"
    shutil.copytree(keys["source"], source)
    inside = keys | {"source": str(source), "project": str(source / "labelled")}
    path = run_label(**inside)
    assert run_label(**inside) == path
    assert len(list(path.parent.glob("images/*"))) == 9


def test_images_without_a_detection_are_background_and_counted(
    keys: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted(Path(keys["source"]).iterdir())
    results = YOLO(keys["teacher"]).predict(files, conf=0.01, verbose=False, device="cpu", batch=4)
    best = sorted(float(result.boxes.conf.max()) for result in results)
    folder = run_label(**keys | {"conf": (best[4] + best[5]) / 2, "name": "some"}).parent
    sizes = [file.stat().st_size for file in folder.glob("labels/*.txt")]
    assert sizes.count(0) == 5
    assert "5 images without a detection: their label files are empty" in capsys.readouterr().out
    run_label(**keys | {"conf": 1, "name": "none"})
    assert "no image has a detection" in capsys.readouterr().out


def test_the_defaults_but_conf_are_ultralytics() -> None:
    defaults = DetectionSettings().model_dump()
    assert defaults.pop("conf") == 0.4
    assert defaults.pop("imgsz") is None  # the teacher's own
    assert defaults == {key: DEFAULT_CFG_DICT[key] for key in defaults}
