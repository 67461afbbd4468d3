"""The command line, run as a process: its commands, and its errors for bad input."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.cli import run_forked, run_yolokd
from helpers.data import write_dataset
from helpers.models import YOLOV8N, YOLOV8S, random_detector, save_checkpoint
from helpers.runs import captured_log
from ultralytics.nn.tasks import ClassificationModel

from yolokd import UserError
from yolokd.cli import _errors_as_user_errors
from yolokd.commands import check
from yolokd.training.plan import make_plan
from yolokd.training.settings import training_keys
from yolokd.version import __version__


def detector_at(layer: int, path: Path) -> str:
    """Write a model yaml whose head reads a single layer of yolov8n's neck."""
    from ultralytics.utils.checks import check_yaml

    content = yaml.safe_load(Path(check_yaml("yolov8.yaml")).read_text())
    content |= {"scale": "n", "nc": 2}
    content["head"][-1] = [[layer], 1, "Detect", ["nc"]]
    path.write_text(yaml.safe_dump(content))
    return str(path)


class Evil:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.target,)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make the files that the cases below name in braces."""
    root = tmp_path_factory.mktemp("files")
    teacher = save_checkpoint(random_detector(YOLOV8S), root / "teacher.pt")
    (root / "truncated.pt").write_bytes(teacher.read_bytes()[:50_000])
    (root / "text.pt").write_text("not a checkpoint")
    torch.save({"weights": torch.zeros(3)}, root / "tensor.pt")
    save_checkpoint(ClassificationModel("yolov8n-cls.yaml", nc=3, verbose=False), root / "classifier.pt")
    coarse = detector_at(21, root / "coarse.yaml")
    save_checkpoint(random_detector(detector_at(15, root / "fine.yaml")), root / "fine.pt")
    write_dataset(root / "d")
    (root / "empty" / "images" / "train").mkdir(parents=True)
    (root / "empty" / "images" / "val").mkdir(parents=True)
    (root / "empty.yaml").write_text(
        yaml.safe_dump({"path": str(root / "empty"), "train": "images/train", "val": "images/val", "names": ["a"]})
    )
    (root / "list.yaml").write_text("- 1\n- 2\n")
    evil = {"model": Evil(root / "written"), "train_args": {}, "epoch": 1, "optimizer": {}}
    with open(root / "evil.pt", "wb"):
        torch.save(evil, root / "evil.pt", pickle_module=pickle)
    return {
        "teacher": str(teacher), "truncated": str(root / "truncated.pt"), "text": str(root / "text.pt"),
        "tensor": str(root / "tensor.pt"), "classifier": str(root / "classifier.pt"), "coarse": coarse,
        "fine": str(root / "fine.pt"), "data": str(root / "d" / "data.yaml"), "empty": str(root / "empty.yaml"),
        "evil": str(root / "evil.pt"), "written": str(root / "written"), "list": str(root / "list.yaml"),
    }  # fmt: skip


OK = "train teacher={teacher} data={data}"
BAD = {
    "frobnicate": "frobnicate: unknown command",
    "trian": "did you mean train?",
    f"{OK} epoch=3": "epoch: unknown key (did you mean epochs?)",
    f"{OK} epochs=3 epochs=4": "epochs: is given twice",
    f"{OK} method=dfx": "method=dfx: no method",
    f"{OK} method=dfd++pdf": "method=dfd++pdf",
    f"{OK} method=dfd+ld student=yolo26n.yaml": "method=ld: compares distributions of box distances, and the student's",
    "check teacher={teacher} data={data} method=ld student=yolo26n.yaml": "(use bckd, which compares the boxes",
    f"{OK} method=crosskd crosskd.box=kl teacher_imgsz=96": "teacher_imgsz=96: gives the teacher cells of another size",
    f"{OK} method=ld teacher_imgsz=96": "teacher_imgsz=96: gives the teacher cells of another size, and ld compares",
    f"{OK} method=": "method=: is empty",
    f"{OK} method=dfd dfd.alpha=-1": "dfd.alpha=-1",
    f"{OK} method=dfd dfd.alpha=much": "dfd.alpha=much",
    f"{OK} method=dfd dfd.alhpa=1": "dfd.alhpa: no such constant (did you mean alpha?)",
    f"{OK} epochs=-1": "epochs",
    f"{OK} epochs=many": "epochs",
    f"{OK} imgsz=wide": "imgsz",
    f"{OK} optimizer=best": "optimizer=best",
    f"{OK} device=7": "device=7",
    f"{OK} distill_model={{teacher}}": "distill_model",
    f"{OK} batch=-1": "batch=-1",
    f"{OK} compile=True": "compile=True",
    f"{OK} teacher_compile=True multi_scale=0.5": "compiles for one image size, and multi_scale=0.5 changes it",
    f"{OK} teacher_precision=int8": "teacher_precision=int8",
    f"{OK} teacher_imgsz=8": "teacher_imgsz=8",
    f"{OK} unlabelled=nowhere": "unlabelled=nowhere: is no folder, list or data set that exists",
    "bench rounds=0": "rounds=0",
    "bench teacher={evil} data={data}": "could run code",
    "bench method=dfx": "method=dfx",
    "bench teacher=nothere.pt data={data}": "teacher=nothere.pt",
    f"{OK} student=nothere.pt": "student=nothere.pt",
    f"{OK} student=nothere.yaml": "student=nothere.yaml",
    f"{OK} student=model.onnx": "neither .yaml nor .pt",
    f"{OK} student=yolov8n": "student=yolov8n: is neither .yaml nor .pt (did you mean yolov8n.yaml?)",
    f"{OK} student=yolov8n-cls.yaml": "is a classification model; yolokd trains YOLO and RT-DETR models",
    f"{OK} student=yolov8n-pose.yaml": "data: kpt_shape=None: is no shape of keypoints",
    f"{OK} student=yolov8n-seg.yaml": "requires equal numbers of boxes and segments",
    f"{OK} student=rtdetr-l.yaml": "student=rtdetr-l.yaml: has no class scores and boxes per position, which pdf needs",
    f"{OK} student={{classifier}}": "student={classifier}: is a classification model; yolokd",
    f"{OK} student={{teacher}}": "is the teacher's own file",
    f"{OK} student={{evil}}": "student={evil}",
    f"{OK} student={{coarse}} teacher2=x": "teacher2: unknown key",
    "train data={data}": "teacher: is missing",
    "train data={data} teacher=nothere.pt": "teacher=nothere.pt",
    "train teacher=nothere.pt": "teacher=nothere.pt",
    "train data={data} teacher=yolov8l.pt": "teacher=yolov8l.pt",
    "train data={data} teacher=yolov8l": "did you mean yolov8l.pt?",
    "train data={data} teacher=yolov8l.yaml": "teacher=yolov8l.yaml",
    "train data={data} teacher={truncated}": "teacher={truncated}",
    "train data={data} teacher={text}": "teacher={text}",
    "train data={data} teacher={tensor}": "teacher={tensor}",
    "train data={data} teacher={classifier}": "teacher={classifier}: is a classification model",
    "train data={data} teacher={evil}": "could run code",
    "train data={data} teacher={fine} student={coarse}": "none in common",
    "train teacher={teacher} data=nothere.yaml": "data=nothere.yaml",
    "train teacher={teacher} data={empty}": "no images",
    "train teacher={teacher} data=3": "data=3",
    "train --teacher={teacher}": "--teacher={teacher}: begins with a dash (write teacher=value)",
    "train teacher = {teacher}": "=: has no key before = (write key=value without spaces",
    "train teacher=[a.pt, b.pt]": "teacher=[a.pt,: is a part of a list, split at a space",
    "val {teacher}": "{teacher}: has no key (write key=value, for example model=",
    "train cfg={data}": "cfg={data}: has an unknown key",
    "export model=best.onnx": "model=best.onnx: is an exported file already",
    "train teacher={teacher} student=yolov8n-seg.yaml data=shapes": "data=shapes: has no labels of masks",
    "train teacher={teacher} data={data} project={text}": "project={text}/train: is not a writable folder",
    "train teacher={teacher} data={data} freeze=abc": "freeze=abc: not a valid value",
    "compare csv=nowhere.csv": "csv=nowhere.csv: no such file",
    "report run={text}": "run={text}: is a file (give the run's folder)",
    "train resume=nothere": "resume=nothere",
    "train resume=True": "resume=True",
    "train resume={evil}": "could run code",
    "train cfg=nothere.yaml": "cfg=nothere.yaml",
    "train cfg={list}": "cfg={list}",
    "check teacher={teacher} data={data} method=dfd epochs=0": "epochs",
    "val": "model: is missing",
    "val model=nothere.pt": "model=nothere.pt",
    "predict model={evil} source=x.jpg": "model={evil}",
    "predict model={teacher} source=nothere.jpg": "nothere.jpg",
    "predict model={teacher} method=dfd source=x.jpg": "method: unknown key",
    "val model={teacher} data=nothere.yaml": "nothere.yaml",
    "label source=x": "teacher: is missing",
    "deploy data={data}": "model: is missing",
    "deploy model={evil} data={data}": "could run code",
    "deploy model={classifier} data={data}": "is a classification model",
    "label teacher={evil} source={data}": "could run code",
    "export": "model: is missing",
    "export model=nothere.pt": "nothere.pt",
    "export model={truncated}": "truncated.pt",
    "export model={evil}": "evil.pt",
    "methods all=True": "all: unknown key",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_gets_one_line_of_error_and_status_2(line: str, files: dict[str, str], tmp_path: Path) -> None:
    arguments = (argument.format(**files) for argument in line.split(" "))
    done = run_forked(*arguments, cwd=tmp_path)
    errors = [e for e in done.stderr.splitlines() if e.startswith("yolokd: error: ")]
    assert done.returncode == 2, done.stdout + done.stderr
    assert len(errors) == 1
    assert BAD[line].format(**files) in errors[0]
    assert "Traceback" not in done.stdout + done.stderr
    assert "Overriding" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []
    assert not Path(files["written"]).exists()


def test_check_calls_method_none_plain_training(files: dict[str, str], tmp_path: Path) -> None:
    done = run_forked("check", "method=none", f"data={files['data']}", "imgsz=64", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "plain Ultralytics training" in done.stdout


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_forked("train", "method=dfx", "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_python_runs_the_package_as_the_command_line(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "yolokd", "version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == __version__


def test_a_package_that_ultralytics_lacks_is_named() -> None:
    with pytest.raises(UserError, match="val: needs aiohttp, which is not installed"), _errors_as_user_errors("val"):
        raise ModuleNotFoundError(name="aiohttp")


def test_without_data_a_training_says_that_it_uses_shapes() -> None:
    with captured_log() as lines:
        assert training_keys({"method": "none"})["data"] == "shapes"
        assert training_keys({"method": "none", "data": "d.yaml"})["data"] == "d.yaml"
    assert [line for line in lines if "`shapes` is used" in line] == lines
    assert len(lines) == 1


def test_trust_loads_a_checkpoint_that_runs_code(files: dict[str, str], tmp_path: Path) -> None:
    """With trust=True the file does run its code: the tests above refuse a file that is really harmful."""
    done = run_forked("check", f"teacher={files['evil']}", f"data={files['data']}", "trust=True", cwd=tmp_path)
    try:
        assert done.returncode == 2
        assert Path(files["written"]).exists()
    finally:
        Path(files["written"]).unlink(missing_ok=True)


def test_methods_lists_papers_and_constants(tmp_path: Path) -> None:
    done = run_forked("methods", cwd=tmp_path)
    assert done.returncode == 0
    assert all(text in done.stdout for text in ("dfd.alpha=", "pdf.distance=l2", "ICML 2024", "BMVC 2021"))


def test_check_shows_the_pairing_and_writes_nothing(files: dict[str, str], tmp_path: Path) -> None:
    done = run_forked("check", f"teacher={files['teacher']}", "student=yolov8n-p2.yaml", f"data={files['data']}",
                  "method=dfd+pdf+sl2", "imgsz=64", "teacher_precision=bf16", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for text in (
        "P3",
        "P5",
        "8x8",
        "adapters",
        "classes paired: 2 of 2 (disc, box)",
        "dfd.alpha=",
        "GFLOPs",
        "relative L2",
    ):
        assert text in done.stdout
    assert "level P2 of the student has no partner in teacher teacher.pt" in done.stdout
    assert "│ P2" not in done.stdout
    assert "ready to train" in done.stdout.splitlines()[-1]
    assert "data: none is given" not in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_check_counts_methods_that_run_the_head_of_a_teacher_with_more_classes(data: str, tmp_path: Path) -> None:
    model = random_detector(YOLOV8N)
    model = type(model)(model.yaml, nc=3, verbose=False)
    model.names = {0: "cat", 1: "box", 2: "disc"}
    teacher = save_checkpoint(model, tmp_path / "t.pt")
    plan = make_plan({"teacher": str(teacher), "model": YOLOV8N, "data": data, "method": "crosskd", "imgsz": 64})
    assert list(check._models_table(plan, 64).columns[0].cells)[-1].startswith("adapters to teacher t.pt")


def test_a_trained_student_validates_predicts_and_its_run_repeats(files: dict[str, str], tmp_path: Path) -> None:
    common = ["imgsz=64", "batch=4", "epochs=1", "plots=False", "device=cpu"]
    done = run_yolokd("train", f"teacher={files['teacher']}", f"student={YOLOV8N}", "method=dfd+pdf",
                  f"data={files['data']}", "dfd.alpha=0.5", "pdf.gain=2", *common, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "distill" / "train"
    assert "teacher: mAP50-95" in done.stdout + done.stderr
    assert yaml.safe_load((run / "distill.yaml").read_text())["dfd.alpha"] == 0.5
    best = run / "weights" / "best.pt"

    done = run_forked(
        "val", f"model={best}", f"data={files['data']}", "imgsz=64", "plots=False", "device=cpu", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    image = next((Path(files["data"]).parent / "images" / "val").glob("*.jpg"))
    done = run_forked("predict", f"model={best}", f"source={image}", "imgsz=64", "line_thickness=2",
                      "device=cpu", f"project={tmp_path}", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob(f"predict*/{image.name}"))

    done = run_forked("train", f"cfg={run / 'distill.yaml'}", "check_teacher=False", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "distill").glob("train*/weights/best.pt"))) == 2

    done = run_forked("train", f"resume={run}", cwd=tmp_path)
    assert done.returncode == 2
    assert "finished" in done.stderr
