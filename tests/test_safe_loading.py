"""Broken and harmful files give clear errors, and none of their code runs."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from helpers.models import random_detector, save_checkpoint
from helpers.results import small_sidecar
from helpers.runs import TINY, captured_log, train_one_epoch
from PIL import EpsImagePlugin
from ultralytics.cfg import get_cfg
from ultralytics.data import utils
from ultralytics.engine.exporter import export_formats
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.utils import ROOT, YAML, checks
from ultralytics.utils.torch_utils import strip_optimizer

from yolokd import UserError, YoloDistiller
from yolokd.cli import predict, val
from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers.process import locked, train_in_process
from yolokd.config.parse import merge_cfg_file
from yolokd.data.dataset import check_images, load_data
from yolokd.distiller import load_yolo
from yolokd.models.checkpoint import load_model, load_student
from yolokd.patches.label_cache import load_label_cache
from yolokd.patches.safe_imports import safe_imports
from yolokd.patches.safe_loading import safe_loading
from yolokd.training.launch import supervise_launch
from yolokd.training.resume.saved_run import load_saved_run
from yolokd.training.resume.sidecar import load_sidecar, save_sidecar, sidecar_path

DAMAGES = 100  # of each kind


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(random_detector(), tmp_path_factory.mktemp("c") / "model.pt")


@pytest.fixture(scope="module")
def interrupted(data: str, teacher: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run that was stopped after its first of two epochs."""
    settings = {**TINY, "data": data, "epochs": 2, "check_teacher": False}
    return train_one_epoch({**settings, "save_dir": str(tmp_path_factory.mktemp("run") / "run")}, teacher)


@pytest.fixture(scope="module")
def sidecar(interrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of the checkpoint of a small sidecar, which is read without an error."""
    last = tmp_path_factory.mktemp("s") / "last.pt"
    save_sidecar(last, 3, small_sidecar(interrupted))
    assert load_sidecar(last, 3) is not None
    return last


def damaged(content: bytes, kind: str, rng: random.Random) -> bytes:
    if kind == "truncated":
        return content[: rng.randrange(len(content))]
    # Anywhere, or at the start, where the pickle is, or at the end, where a zip file has its table of contents.
    where = rng.choice([range(len(content)), range(4000), range(len(content) - 20000, len(content))])
    flipped = bytearray(content)
    flipped[rng.choice(where)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def loads_or_raises_user_error(load: Any) -> bool:
    """Return whether a file loads. Fails on anything but success or a UserError of one line."""
    try:
        load()
    except UserError as e:
        assert "\n" not in str(e)
        return False
    return True


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
@pytest.mark.parametrize("argument", ["teacher", "student", "resume"])
def test_a_damaged_checkpoint_gives_one_line_of_error(
    kind: str, argument: str, checkpoint: Path, tmp_path: Path
) -> None:
    rng, content, path = random.Random(argument + kind), checkpoint.read_bytes(), tmp_path / "damaged.pt"
    outcomes = []
    for _ in range(DAMAGES):
        path.write_bytes(damaged(content, kind, rng))
        outcomes.append(loads_or_raises_user_error(lambda: load_model(path, argument)))
    assert outcomes.count(False) >= (DAMAGES if kind == "truncated" else 5)


@pytest.mark.parametrize("kind", ["truncated", "flipped"])
def test_a_damaged_sidecar_gives_one_line_of_error(kind: str, sidecar: Path, tmp_path: Path) -> None:
    rng, content, last = random.Random(kind), sidecar_path(sidecar, 3).read_bytes(), tmp_path / "last.pt"
    outcomes = []
    for _ in range(DAMAGES):
        sidecar_path(last, 3).write_bytes(damaged(content, kind, rng))
        outcomes.append(loads_or_raises_user_error(lambda: load_sidecar(last, 3)))
    assert outcomes.count(False) >= (DAMAGES if kind == "truncated" else 5)


def test_the_error_for_a_sidecar_of_another_format_names_the_version_that_wrote_it(tmp_path: Path) -> None:
    save_sidecar(tmp_path / "last.pt", 0, {"format": 0, "yolokd": "0.0.9"})
    with pytest.raises(UserError, match=r"has the format of yolokd 0\.0\.9"):
        load_sidecar(tmp_path / "last.pt", 0)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.write_text, (self.path, "boom")


@pytest.mark.parametrize("name", ["plain pickle", "in a checkpoint", "in a sidecar"])
def test_no_code_in_a_file_runs(name: str, checkpoint: Path, tmp_path: Path) -> None:
    target, last = tmp_path / "target", tmp_path / "last.pt"
    if name == "in a sidecar":
        torch.save({"epoch": 0, "extra": Payload(target)}, sidecar_path(last, 0))
    elif name == "plain pickle":
        last.write_bytes(pickle.dumps(Payload(target)))
    else:
        torch.save(torch.load(checkpoint, weights_only=False) | {"extra": Payload(target)}, last)
    with pytest.raises(UserError):
        load_sidecar(last, 0) if name == "in a sidecar" else load_model(last, "teacher")
    assert not target.exists()


def test_no_code_in_a_label_cache_runs_and_its_labels_are_scanned_anew(data: str, tmp_path: Path) -> None:
    target, copy = tmp_path / "target", tmp_path / "copy"
    shutil.copytree(Path(data).parent, copy)
    settings = get_cfg(overrides={"data": str(copy / "data.yaml"), "imgsz": 64})
    loaded = load_data(settings.data)
    check_images(loaded, settings)
    cache = next(copy.rglob("train.cache"))
    labels = load_label_cache(cache)["labels"]
    expected = np.load(cache, allow_pickle=True).item()["labels"]
    assert [label["im_file"] for label in labels] == [label["im_file"] for label in expected]
    assert all(np.array_equal(a["bboxes"], b["bboxes"]) for a, b in zip(labels, expected, strict=True))
    with open(cache, "wb") as f:
        np.save(f, np.array({"version": "1", "labels": Payload(target)}, dtype=object))
    check_images(loaded, settings)
    assert not target.exists()
    assert len(load_label_cache(cache)["labels"]) == len(labels)


@pytest.mark.parametrize(
    "hostile",
    [
        {"activation": "Path('{target}').write_text('boom')"},
        {"activation": "[nn.SiLU(), __import__('pathlib').Path('{target}').write_text('boom')][0]"},
        {"head": [[-1, 1, "torch_safe_load", ["{pickle}", False]]]},
    ],
)
def test_no_code_in_a_students_yaml_runs(hostile: dict[str, Any], tmp_path: Path) -> None:
    target, pickled = tmp_path / "target", tmp_path / "pickle.pt"
    torch.save({"model": Payload(target)}, pickled)
    text = yaml.safe_dump(YAML.load(ROOT / "cfg/models/v8/yolov8.yaml") | hostile)
    text = text.replace("{target}", str(target)).replace("{pickle}", str(pickled))
    (tmp_path / "yolov8n.yaml").write_text(text)
    with pytest.raises(UserError, match="does not describe a YOLO detector"):
        load_student(str(tmp_path / "yolov8n.yaml"), {"nc": 2, "channels": 3}, trust=False)
    assert not target.exists()


def copied(run: Path, folder: Path) -> Path:
    """Copy a run's checkpoint and sidecar into another folder, as a stranger would send them; return the folder."""
    shutil.copytree(run / "weights", folder / "weights")
    return folder


def test_files_cannot_trust_themselves(interrupted: Path, tmp_path: Path) -> None:
    """Trust comes from the command line or from Python, not from a checkpoint, a sidecar or a cfg= file."""
    target = tmp_path / "target"
    last = copied(interrupted, tmp_path / "stranger") / "weights" / "last.pt"
    checkpoint = torch.load(last, weights_only=False)
    torch.save(checkpoint | {"train_args": checkpoint["train_args"] | {"trust": True}}, last)
    state = load_sidecar(last, 0)
    assert state is not None
    save_sidecar(last, 0, state | {"own": state["own"] | {"trust": True}})
    torch.save({"model": Payload(target)}, tmp_path / "stranger" / "teacher.pt")
    hostile = {"train": "missing", "val": "missing", "names": ["a"], "download": f"open('{target}', 'w')"}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(hostile))
    with captured_log() as lines, pytest.raises(UserError, match="its download: is code"):
        YoloDistiller().train(resume=str(last), data=str(tmp_path / "data.yaml"))
    assert any("its trust=True is ignored" in line for line in lines)
    with pytest.raises(UserError, match="could run code"):
        YoloDistiller().train(resume=str(last), teacher=str(tmp_path / "stranger" / "teacher.pt"))
    (tmp_path / "distill.yaml").write_text(yaml.safe_dump({"trust": True, "method": "none", "data": "data.yaml"}))
    with captured_log() as lines:
        assert "trust" not in merge_cfg_file({"cfg": tmp_path / "distill.yaml"})
    assert any("its trust=True is ignored" in line for line in lines)
    assert merge_cfg_file({"cfg": tmp_path / "distill.yaml", "trust": True})["trust"] is True
    assert not target.exists()


def test_a_copied_run_resumes_where_it_lies_and_leaves_the_original_alone(interrupted: Path, tmp_path: Path) -> None:
    original = {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    folder = copied(interrupted, tmp_path / "copy")
    distiller = YoloDistiller()
    distiller.train(resume=str(folder))
    assert Path(distiller.trainer.save_dir) == folder
    assert len((folder / "results.csv").read_text().splitlines()) == 3
    assert original == {path: path.read_bytes() for path in interrupted.rglob("*") if path.is_file()}
    loose = tmp_path / "loose"
    shutil.copytree(interrupted / "weights", loose)
    assert load_saved_run({"resume": str(loose / "last.pt")}).folder == loose


@pytest.mark.parametrize("name", ["results.csv", "args.yaml", "weights/best.pt"])
def test_a_resume_writes_through_no_link_of_a_strangers_folder(name: str, interrupted: Path, tmp_path: Path) -> None:
    folder, elsewhere = copied(interrupted, tmp_path / "stranger"), tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(UserError, match=f"its {name} is a link, which could lead elsewhere"):
        YoloDistiller().train(resume=str(folder))
    assert elsewhere.read_text() == "mine"


class Writer(torch.nn.Module):
    """A TorchScript program that writes a file at each forward pass."""

    def __init__(self, target: Path) -> None:
        super().__init__()
        self.target = str(target)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, self.target)
        return torch.zeros(1, 6, 84)


def test_a_torchscript_model_runs_for_a_person_who_trusts_it_alone(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "save", torch.serialization.save)  # TorchScript does not know Ultralytics' replacement
    model, target = tmp_path / "m.torchscript", tmp_path / "target"
    torch.jit.script(Writer(target)).save(model)
    keys = {"model": str(model), "imgsz": 64, "device": "cpu", "project": str(tmp_path / "runs")}
    source = str(next((Path(data).parent / "images" / "val").iterdir()))
    for run in (lambda: predict({**keys, "source": source}), lambda: val({**keys, "data": data})):
        with pytest.raises(UserError, match=r"m\.torchscript: has a format that can hold programs"):
            run()
    with safe_loading(), pytest.raises(UserError, match="can hold programs"):
        torch.jit.load(model)  # as the text model of a YOLOE
    assert not target.exists()
    predict({**keys, "source": source, "trust": True})
    assert target.exists()


def test_exported_models_of_all_formats_but_onnx_are_refused() -> None:
    suffixes = [suffix for suffix in export_formats()["Suffix"] if suffix not in {".pt", ".onnx"}]
    assert len(suffixes) > 15
    for suffix in [*suffixes, "_saved_model", "_openvino_model"]:
        with safe_loading(), pytest.raises(UserError, match="can hold programs"):
            AutoBackend(f"model{suffix}")


def test_no_code_runs_when_a_checkpoint_is_stripped(checkpoint: Path, tmp_path: Path) -> None:
    target, best = tmp_path / "target", tmp_path / "best.pt"
    torch.save(torch.load(checkpoint, weights_only=False) | {"extra": Payload(target)}, best)
    before = best.read_bytes()
    with safe_loading():
        assert strip_optimizer(best) == {}
        assert strip_optimizer(checkpoint, str(tmp_path / "stripped.pt"))["epoch"] == -1
    assert not target.exists()
    assert best.read_bytes() == before


class HookedParameter(torch.nn.Parameter):
    """A parameter whose pickle says that a class is to be called in each backward pass."""

    def __reduce_ex__(self, _protocol: Any) -> Any:
        return torch._utils._rebuild_parameter, (self.data, True, OrderedDict({0: torch.nn.Sequential}))


@pytest.mark.parametrize("place", ["layer", "parameter"])
def test_a_checkpoint_that_hooks_functions_into_its_model_is_refused(place: str, tmp_path: Path) -> None:
    """Hooks run at each forward or backward pass. Restricted loading keeps those that are known classes' functions."""
    model = random_detector()
    if place == "layer":
        model.model[3].register_forward_pre_hook(torch.nn.Module.share_memory)
    else:
        model.model[3].conv.weight = HookedParameter(model.model[3].conv.weight.data)
    with pytest.raises(UserError, match="could run code"):
        load_model(save_checkpoint(model, tmp_path / "model.pt"), "teacher")


def write_script(path: Path, target: Path) -> None:
    """Write a program that only writes `target`."""
    path.write_text(f"#!/bin/sh\ntouch '{target}'\n")
    path.chmod(0o755)


def hide_package(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a package seem not to be installed."""
    version = metadata.version

    def find_version(name: str) -> str:
        if name == hidden:
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", find_version)


def test_a_checkpoint_installs_no_package(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key `modelopt` makes Ultralytics run `uv pip install`; here, a script stands for uv."""
    target, model = tmp_path / "target", tmp_path / "model.pt"
    write_script(tmp_path / "uv", target)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(checks, "AUTOINSTALL", True)
    monkeypatch.setattr(checks, "ONLINE", True)
    hide_package("nvidia-modelopt", monkeypatch)  # it may be installed here
    torch.save(torch.load(checkpoint, weights_only=False) | {"modelopt": {"modelopt": {}, "ranges": {}}}, model)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_model(model, "teacher")
    assert not target.exists()
    with pytest.raises(UserError):
        load_model(model, "teacher", trust=True)
    assert target.exists()  # Ultralytics did run it


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_that_is_a_program_does_not_run_in_a_prediction_from_python(
    stream: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, images = tmp_path / "target", tmp_path / "images"
    write_script(tmp_path / "gs", target)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    images.mkdir()
    (images / "a.avif").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n%%EOF\n")
    cv2.imwrite(str(images / "b.png"), np.zeros((64, 64, 3), np.uint8))
    distiller = YoloDistiller()
    distiller._model = load_yolo(checkpoint)
    results = list(distiller.predict(images, stream=stream, imgsz=64, device="cpu", verbose=False))
    assert [Path(result.path).name for result in results] == ["b.png"]
    assert not target.exists()


@pytest.fixture
def ran_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a folder with two modules of the standard library's names; return the file that either writes."""
    target = tmp_path / "target"
    for name in ("multiprocessing", "colorsys"):
        (tmp_path / f"{name}.py").write_text(f"open({str(target)!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    return target


def test_no_module_in_the_working_folder_runs_in_a_launch_of_processes(ran_module: Path) -> None:
    command = [sys.executable, "-m", "colorsys"]  # stands for torch.distributed.run, which takes seconds
    supervise_launch(lambda: subprocess.run(command, check=True), lambda: "")
    assert not ran_module.exists()
    subprocess.run(command, check=True)
    assert ran_module.exists()


def test_no_module_in_the_working_folder_runs_in_a_new_process(ran_module: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=int)
    with safe_imports():
        process.start()
    process.join()
    assert process.exitcode == 0
    assert not ran_module.exists()


@pytest.mark.slow
def test_no_module_in_the_working_folder_runs_in_a_comparison(ran_module: Path, tmp_path: Path) -> None:
    run = ComparisonRun(method="none", seed=0, split="val", keys={}, config="", ground="", project=tmp_path / "project")
    with locked(run), pytest.raises(RuntimeError, match="none with seed 0 failed"):
        train_in_process(run, "cpu")
    assert not ran_module.exists()


PLOTS = {
    "ours": """
from pathlib import Path
from yolokd.runtime.plots import new_plot
with new_plot(Path("plot.png")) as figure:
    figure.suptitle("a")""",
    "Ultralytics'": """
from yolokd.patches.safe_loading import safe_loading
from ultralytics.utils import plt_settings
@plt_settings()
def draw():
    import matplotlib.pyplot as plt
    plt.title("a")
    plt.savefig("plot.png")
with safe_loading(TRUST):
    draw()""",
}


@pytest.mark.parametrize("program", PLOTS.values(), ids=PLOTS)
def test_settings_of_matplotlib_in_the_working_folder_do_not_count(program: str, tmp_path: Path) -> None:
    """A matplotlibrc can turn on LaTeX; here, a script stands for LaTeX."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    (tmp_path / "latex").write_text(f"#!/bin/sh\ntouch '{tmp_path}/ran'\n")
    (tmp_path / "latex").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def run(trust: bool) -> int:
        command = [sys.executable, "-c", program.replace("TRUST", str(trust))]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode

    assert run(trust=False) == 0
    assert not (tmp_path / "ran").exists()
    assert (tmp_path / "plot.png").stat().st_size > 100
    if "TRUST" in program:
        run(trust=True)
        assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_data_set_in_an_archive_writes_nothing_outside_its_folder(
    kind: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "DATASETS_DIR", tmp_path / "datasets" / "inner")
    root, archive = Path(data).parent, tmp_path / f"set.{kind}"
    members = {f"set/{path.relative_to(root)}": path for path in root.rglob("*") if path.suffix != ".cache"}
    members = {name: path for name, path in members.items() if path.is_file()} | {"../escaped": Path(data)}
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for name, path in members.items():
                zipped.write(path, name)
    else:
        with tarfile.open(archive, "w") as tar:
            for name, path in members.items():
                tar.add(path, name)
    assert len(load_data(str(archive))["names"]) == 2
    assert not (tmp_path / "datasets" / "escaped").exists()
    assert not list((tmp_path / "datasets").rglob("escaped"))


@pytest.mark.parametrize("reader", ["data", "cfg", "student", "tracker"])
def test_no_code_in_a_yaml_file_runs(reader: str, tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "yolov8n.yaml"
    path.write_text(f"train: !!python/object/apply:os.mkdir ['{target}']\n")
    readers: dict[str, Any] = {
        "data": lambda: load_data(str(path)),
        "cfg": lambda: merge_cfg_file({"cfg": path}),
        "student": lambda: load_student(str(path), {"nc": 2, "channels": 3}, trust=False),
        "tracker": lambda: YAML.load(path),
    }
    with pytest.raises((UserError, ValueError)):
        readers[reader]()
    assert not target.exists()


def test_a_data_set_as_ndjson_is_not_read_in_a_training(tmp_path: Path) -> None:
    """Ultralytics would write the keys of its first line, `download` among them, into a data .yaml."""
    target, path = tmp_path / "target", tmp_path / "set.ndjson"
    path.write_text(f'{{"task": "detect", "download": "open({str(target)!r}, \'w\')", "class_names": {{"0": "a"}}}}\n')
    with pytest.raises(UserError, match=r"data=.*set\.ndjson: cannot be used: Not a YAML file"):
        load_data(str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["set.ndjson"]
