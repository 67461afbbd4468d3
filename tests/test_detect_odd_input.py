"""export/detect.py with odd models, images and arguments: one line of error, and no file lost."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from helpers.device import SCRIPT, detect
from helpers.networks import METADATA, TWO_BOXES, boxes, write_network
from onnx import TensorProto

DYNAMIC = ((TensorProto.FLOAT, ["batch", 3, "height", "width"]),)
HIDDEN: dict[str, Any] = {"inputs": DYNAMIC, "hide_shape": True}
FINAL = METADATA | {"end2end": "True"}
PHOTO = np.random.default_rng(0).integers(0, 255, (50, 60, 3), dtype=np.uint8)


def encoded(suffix: str, image: np.ndarray = PHOTO) -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / "photo.png"
    path.write_bytes(encoded(".png"))
    return path


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Return a function that runs detect.py in this process, and gives its exit status and all that it writes to
    stderr, also from C++."""

    def run_detect(*arguments: object) -> tuple[int, str]:
        status = detect.main([*map(str, arguments), "--out", str(tmp_path / "copies")])
        return status, capfd.readouterr().err

    return run_detect


def assert_one_line(result: tuple[int, str], words: str = "") -> None:
    status, error = result
    assert status == 2
    assert error.startswith("detect.py: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    assert words in error


def records(path: Path) -> Any:
    """Return the content of a JSON file; fail for NaN, Infinity, and half of a surrogate pair, which JSON forbids."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    json.dumps(content, ensure_ascii=False).encode()
    return content


NO_DETECTOR: dict[str, dict[str, Any]] = {
    "no input": {"inputs": ()},
    "two inputs": {"inputs": ((TensorProto.FLOAT, (1, 3, 64, 64)),) * 2},
    **{
        f"an input of type {kind}": {"inputs": ((getattr(TensorProto, kind), (1, 3, 64, 64)),)}
        for kind in ("DOUBLE", "INT8", "BFLOAT16", "STRING")
    },
    **{
        f"an input of shape {shape}": {"inputs": ((TensorProto.FLOAT, shape),)}
        for shape in ([], [1, 3, 64], [1, 3, 64, 64, 1], [1, 1, 64, 64], [1, "c", 64, 64], [0, 3, 64, 64], [1, 3, 0, 0])
    },
    **{
        f"an output of shape {result.shape}": {"result": result}
        for result in (TWO_BOXES[0], TWO_BOXES[None], TWO_BOXES[:, :4], TWO_BOXES[:, :5], np.float32(3))
    },
    **{
        f"an output of type {result.dtype}": {"result": result}
        for result in (TWO_BOXES.astype(np.int64), TWO_BOXES.astype(np.float64), np.array([[["a"]]], object))
    },
    "no names": {"metadata": {}},
    "no class": {"result": TWO_BOXES[:, :4], "metadata": METADATA | {"names": "{}"}},
    "a class too many": {"metadata": METADATA | {"names": "{0: 'disc', 1: 'box', 2: 'cone'}"}},
}  # fmt: skip
BROKEN_OUTPUT: dict[str, dict[str, Any]] = {
    "NaN": {"result": TWO_BOXES * np.float32(np.nan)},
    "infinity": {"result": TWO_BOXES * np.float32(np.inf)},
    "numbers near overflow": {"result": TWO_BOXES * 0 + np.float32(3e38)},
    "fields of classes without a name": {"result": np.concatenate([TWO_BOXES, TWO_BOXES], 1), **HIDDEN},
    "final rows with NaN": {"result": np.full((1, 3, 6), np.nan, np.float32), "metadata": FINAL},
    "final rows of another length": {"result": TWO_BOXES, "metadata": FINAL, **HIDDEN},
}
TOO_LARGE: dict[str, dict[str, Any]] = {
    "a huge image": {"inputs": ((TensorProto.FLOAT, (1, 3, 10**9, 10**9)),)},
    "a huge batch": {"inputs": ((TensorProto.FLOAT, (10**9, 3, 64, 64)),)},
    "a huge stride": {"inputs": DYNAMIC, "metadata": METADATA | {"stride": str(2**28)}},
}
BAD_METADATA = {
    "names": ["", "{0: 'disc'", "None", "['disc', 'box']", "{0: 1, 1: 2}", "{'a': 'disc', 'b': 'box'}", "{[]: 'disc'}",
              "-" * 200_000 + "1", "(" * 5000, "9" * 6000, str({i: f"class {i}" for i in range(100_000)})],
    "stride": ["0", "-32", "1e2", "10**9", "1000000000", "'32'", "[32]", "True"],
    "imgsz": ["64", "[]", "[64]", "[64, 64, 64]", "[0, 0]", "[-64, 64]", "['64', '64']", "[64.5, 64]"],
    "end2end": ["1", "None", "'False'"],
    "args": ["[]", "None", "nms=True"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("network", "words"),
    [
        pytest.param(network, words, id=name)
        for kinds, words in (
            (NO_DETECTOR, "not a YOLO detector"),
            (BROKEN_OUTPUT, "is broken"),
            (TOO_LARGE, "pixels are more than"),
            ({"no image in the batch": {"result": TWO_BOXES[:0]}}, "does not run at 64x64"),
        )
        for name, network in kinds.items()
    ],
)
def test_a_model_that_gives_no_boxes_is_one_line_of_error(
    network: dict[str, Any], words: str, run: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    model = write_network(tmp_path / "odd.onnx", **network)
    assert_one_line(run(model, photo, "--json", tmp_path / "found.json"), words)
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize("key", BAD_METADATA)
def test_broken_metadata_are_one_line_of_error(key: str, run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    for value in BAD_METADATA[key]:
        model = write_network(tmp_path / "odd.onnx", inputs=DYNAMIC, metadata=METADATA | {key: value})
        assert_one_line(run(model, photo), f"no valid {key}:")


@pytest.mark.parametrize("key", METADATA)
def test_code_in_metadata_does_not_run(key: str, run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    for code in (f"open({str(written)!r}, 'w')", f"__import__('os').system('touch {written}')"):
        for value in (code, f"{{0: {code}, 1: 'box'}}", f"[{code}, 64]", f"f'{{{code}}}'"):
            model = write_network(tmp_path / "odd.onnx", inputs=DYNAMIC, metadata=METADATA | {key: value})
            assert_one_line(run(model, photo), f"no valid {key}:")
    assert not written.exists()


def test_a_graph_runs_no_operator_of_its_own(run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    """ONNX Runtime runs its own operators only, unless a program registers a library of others."""
    model = onnx.load(write_network(tmp_path / "odd.onnx"))
    model.graph.node[0].domain, model.graph.node[0].op_type = "com.stranger", "Shell"
    model.opset_import.append(onnx.helper.make_opsetid("com.stranger", 1))
    onnx.save(model, tmp_path / "odd.onnx")
    assert_one_line(run(tmp_path / "odd.onnx", photo), "com.stranger")


def test_a_graph_reads_no_weights_outside_its_folder(run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    """An ONNX file may name other files that hold its weights."""
    path = tmp_path / "inside" / "odd.onnx"
    path.parent.mkdir()
    for file in (tmp_path / "outside", path.with_name("beside")):
        file.write_bytes(TWO_BOXES.tobytes())
    results = {}
    for place in ("beside", "../outside", str(tmp_path / "outside")):
        model = onnx.load(write_network(path))
        onnx.external_data_helper.set_external_data(model.graph.initializer[0], place)
        model.graph.initializer[0].ClearField("raw_data")
        path.write_bytes(model.SerializeToString())
        results[place] = run(path, photo)
    assert results.pop("beside")[0] == 0
    for result in results.values():
        assert_one_line(result, "can't load it")


def test_a_file_cut_off_or_changed_anywhere_is_at_most_one_line_of_error(
    run: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    path = write_network(tmp_path / "odd.onnx")
    good, rng = path.read_bytes(), np.random.default_rng(0)
    contents = [good[:length] for length in range(0, len(good), 40)]
    for _ in range(60):
        changed = np.frombuffer(good, np.uint8).copy()
        changed[rng.integers(0, len(good), 3)] = rng.integers(0, 256, 3)
        contents.append(changed.tobytes())
    results = []
    for content in contents:
        path.write_bytes(content)
        results.append(run(path, photo))
    for result in results:
        if result != (0, ""):
            assert_one_line(result)
    assert sum("not UTF-8" in error for _, error in results) > 1


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "loop"])
def test_what_is_no_model_file_is_one_line_of_error(
    kind: str, run: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    make: dict[str, Callable[[], Any]] = {
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
    }
    make[kind]()
    assert_one_line(run(path, photo), "no such model file")


def test_odd_class_names_and_boxes_give_valid_json(run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    names = str({0: '\ud800 \udcff \n \x1b[31m \0 "', 1: "x" * 100_000})
    result = boxes((20, 20, -10, -10, 0.9, 0.1), (1e8, 40, 2e8, 20, 0.2, 9.5), (-50, -40, 20, 20, 0.8, 0.2))
    model = write_network(tmp_path / "odd.onnx", result, metadata=METADATA | {"names": names})
    assert run(model, photo, "--json", tmp_path / "found.json") == (0, "")
    (record,) = records(tmp_path / "found.json")
    assert {found["class"] for found in record["detections"]} == {0, 1}
    rows = np.array([[[10, 10, 30, 30, 0.9, -5], [10, 10, 30, 30, 0.8, 2e8]]], np.float32)
    model = write_network(tmp_path / "final.onnx", rows, metadata=FINAL)
    assert run(model, photo, "--json", tmp_path / "found.json") == (0, "")
    (record,) = records(tmp_path / "found.json")
    assert [found["name"] for found in record["detections"]] == ["-5", "200000000"]


USABLE = {
    "one pixel.png": encoded(".png", PHOTO[:1, :1]),
    "wide.png": encoded(".png", np.zeros((1, 10_000, 3), np.uint8)),
    "tall.png": encoded(".png", np.zeros((10_000, 1, 3), np.uint8)),
    "deep.png": encoded(".png", PHOTO.astype(np.uint16) * 257),
    "alpha.png": encoded(".png", np.dstack([PHOTO, PHOTO[..., 0]])),
    "gray.JPG": encoded(".jpg", PHOTO[..., 0]),
    "a PNG.jp2": encoded(".png"),
    "line\nbreak.jpg": encoded(".jpg"),
    os.fsdecode(b"not utf-8 \xff\xfe.jpg"): encoded(".jpg"),
    os.fsdecode(b"not utf-8 \xff\xfd.jpg"): encoded(".jpg"),
    "größe 数.jpg": encoded(".jpg"),
    "n" * 240 + ".jpg": encoded(".jpg"),
    "too wide for its format.webp": encoded(".png", np.zeros((2, 20_000, 3), np.uint8)),
}


def broken_images(folder: Path) -> list[Path]:
    """Write what has an image's name and is none; return the paths."""
    bitmap = b"BM" + bytes(12) + b"\x28\0\0\0" + (60_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
    contents = {"empty": b"", "text": b"no image", "cut": encoded(".jpg")[:300], "gif": b"GIF89a\1\0\1\0\0\0\0;",
                "huge": bitmap}  # fmt: skip
    for name, content in contents.items():
        (folder / f"{name}.jpg").write_bytes(content)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    for name, target in (("loop", "loop.jpg"), ("endless", "/dev/zero"), ("dangling", "nowhere")):
        (folder / f"{name}.jpg").symlink_to(target)
    with open(folder / "terabyte.jpg", "wb") as sparse:
        sparse.truncate(10**12)
    return sorted(folder.iterdir())


def test_no_odd_image_loses_the_detections_of_others(run: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    broken = broken_images(folder)
    for name, content in USABLE.items():
        (folder / name).write_bytes(content)
    status, error = run(write_network(tmp_path / "m.onnx"), folder, "--json", tmp_path / "found.json")
    assert status == 0
    found = records(tmp_path / "found.json")
    assert len(found) == len({record["image"] for record in found}) == len(USABLE)
    assert all(len(record["detections"]) == 2 for record in found)
    assert str(folder / r"not utf-8 \udcff\udcfe.jpg") in {record["image"] for record in found}
    reported = {line.partition(": ")[0] for line in error.splitlines()}
    without_copy = {folder / name for name in USABLE if not (tmp_path / "copies" / name).exists()}
    assert without_copy >= {folder / "too wide for its format.webp"}
    assert reported == {str(path) for path in (*broken, *without_copy)}


def test_a_single_broken_image_is_one_line_of_error(run: Callable[..., Any], tmp_path: Path) -> None:
    model, folder = write_network(tmp_path / "m.onnx"), tmp_path / "photos"
    folder.mkdir()
    for path in broken_images(folder):
        assert_one_line(run(model, path), path.name)


@pytest.mark.parametrize(
    ("name", "out", "words"),
    [
        ("a.gif", "copies", "no frame of this video"),
        ("a.mp4", "copies", "no frame of this video"),
        (os.fsdecode(b"\xff.mp4"), "copies", "must be UTF-8"),
        ("a.mp4", os.fsdecode(b"\xff"), "must be UTF-8"),
    ],
)
def test_a_video_that_can_not_be_read_or_written_is_one_line_of_error(
    name: str, out: str, words: str, tmp_path: Path
) -> None:
    """In a process of its own: FFmpeg reads its log level once, and OpenCV crashes for names that are not UTF-8."""
    (tmp_path / name).write_bytes(b"GIF89a\1\0\1\0\0\0\0;")
    command = [sys.executable, SCRIPT, write_network(tmp_path / "m.onnx"), tmp_path / name, "--out", tmp_path / out]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert_one_line((done.returncode, done.stderr), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--conf", "nan"], "nan is not between 0 and 1"),
        (["--conf", "much"], "much is not between 0 and 1"),
        (["--iou", "-1"], "-1 is not between 0 and 1"),
        (["--imgsz", "0"], "positive side"),
        (["--imgsz", "-1", "64"], "positive side"),
        (["--imgsz", "1", "2", "3"], "height and width"),
        (["--imgsz", str(10**9)], "more than"),
        (["--imgsz", str(10**30)], "more than"),
        (["--imgsz", "9" * 6000], "imgsz"),
        (["--imgsz", "1.5"], "imgsz"),
        (["--nonsense"], "--nonsense"),
        (["--conf"], "expected one argument"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_line_of_error(
    arguments: list[str], words: str, run: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    model = write_network(tmp_path / "m.onnx", inputs=DYNAMIC)
    assert_one_line(run(model, photo, *arguments), words)
    assert not (tmp_path / "copies").exists()


def test_arguments_that_are_missing_are_one_line_of_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert_one_line((detect.main([]), capfd.readouterr().err), "model, source")


@pytest.mark.parametrize("kind", ["file", "loop", "below a file"])
def test_an_out_that_can_be_no_folder_is_one_line_of_error(
    kind: str, photo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    model, out = write_network(tmp_path / "m.onnx"), tmp_path / ("file/out" if kind == "below a file" else kind)
    status = detect.main([str(model), str(photo), "--out", str(out)])
    assert_one_line((status, capfd.readouterr().err), str(out))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("number", [None, np.zeros((0, 5, 3), np.uint8)])
def test_no_image_is_refused(number: Any, tmp_path: Path) -> None:
    """OpenCV's imread returns None for a file that it can't read."""
    with pytest.raises(detect.DetectError, match="an image must be"):
        detect.Detector(write_network(tmp_path / "m.onnx"))(number)


def test_a_pipe_for_json_is_written_to_and_stays_a_pipe(run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    pipe, content = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: content.append(pipe.read_bytes()), daemon=True)
    reader.start()
    assert run(write_network(tmp_path / "m.onnx"), photo, "--json", pipe) == (0, "")
    reader.join(10)
    assert len(json.loads(content[0])[0]["detections"]) == 2
    assert pipe.is_fifo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies", "m.onnx", "photos", "pipe"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_for_json_stays_a_link(exists: bool, run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    link, target = tmp_path / "link.json", tmp_path / "target.json"
    link.symlink_to(target)
    if exists:
        target.write_text("something longer than the records " * 100)
    assert run(write_network(tmp_path / "m.onnx"), photo, "--json", link) == (0, "")
    assert link.is_symlink()
    assert len(records(target)) == 1


def test_json_on_stdout_is_all_that_stdout_holds(
    photo: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # /dev/stdout is such a link. A test that fails must not replace it.
    (tmp_path / "stdout").symlink_to("/proc/self/fd/1")
    arguments = [write_network(tmp_path / "m.onnx"), photo, "--out", tmp_path / "copies", "--json", tmp_path / "stdout"]
    assert detect.main(list(map(str, arguments))) == 0
    output = capfd.readouterr()
    assert len(json.loads(output.out)) == 1
    assert output.err.startswith("1 images, 2 detections")


def test_json_that_can_not_be_written_is_one_line_of_error(
    run: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    model = write_network(tmp_path / "m.onnx")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/found.json")
    (tmp_path / "full").symlink_to("/dev/full")
    for name in (".", "loop", "dangling", "full", "m.onnx/found.json", "x" * 300):
        assert_one_line(run(model, photo, "--json", tmp_path / name))


def test_a_full_disk_leaves_the_older_json_and_no_temporary_file(
    run: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    """A limit on the size of this process's files stands for a full disk."""
    names = str({0: "disc" * 5000, 1: "box"})
    model, found = write_network(tmp_path / "m.onnx", metadata=METADATA | {"names": names}), tmp_path / "found.json"
    found.write_text("[]")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, limits[1]))
    try:
        result = run(model, photo, "--json", found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_one_line(result, "File too large")
    assert found.read_text() == "[]"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copies", "found.json", "m.onnx", "photos"]


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_an_input_is_not_overwritten_through_a_link(
    link: Callable[..., None], run: Callable[..., Any], photo: Path, tmp_path: Path
) -> None:
    model = write_network(tmp_path / "m.onnx")
    before = photo.read_bytes(), model.read_bytes()
    for original in (photo, model):
        link(original, tmp_path / f"{original.name}.json")
        for target in (original, tmp_path / f"{original.name}.json"):
            assert_one_line(run(model, photo, "--json", target), "is an input")
    (tmp_path / "copies").mkdir()
    link(photo, tmp_path / "copies" / photo.name)
    assert_one_line(run(model, photo), "is an input")
    assert before == (photo.read_bytes(), model.read_bytes())


def test_ctrl_c_ends_with_one_line(run: Callable[..., Any], photo: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "nobody reads this")
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        result = run(write_network(tmp_path / "m.onnx"), photo, "--json", tmp_path / "nobody reads this")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert result == (130, "detect.py: interrupted\n")
