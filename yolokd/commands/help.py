"""`yolokd help`: what each command does, its keys, and examples; starts without torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.table import Table

from yolokd.config.descriptions import Key, ultralytics_keys, yolokd_keys
from yolokd.runtime.console import CONSOLE, make_console

MAX_WIDTH = 110  # in characters: longer lines are hard to read
KEY_WIDTH = 28
MODEL = Key("model", "", "required: a checkpoint, such as runs/distill/train/weights/best.pt")
SOURCE = Key("source", "", "required: a folder, a .txt with one image per line, or a data set's .yaml")
SPLIT = Key("split", "none", "the split to read, if the source is a data set: train, val or test; none: train")
TRUST = yolokd_keys()["trust"]
TEACHER = yolokd_keys()["teacher"]


@dataclass(frozen=True)
class Help:
    """The help of a command, beside its summary.

    keys: those of cfg/default.yaml come first if `all_training_keys`. ultralytics: names of the keys of `yolo MODE`
    that matter most; more_keys: a sentence on which other keys the command takes.
    """

    examples: tuple[str, str]
    keys: tuple[Key, ...] = ()
    all_training_keys: bool = False
    ultralytics: tuple[str, ...] = ()
    more_keys: str = ""

    @property
    def described_keys(self) -> tuple[Key, ...]:
        """Return the command's own keys."""
        return (*(yolokd_keys().values() if self.all_training_keys else ()), *self.keys)


CONSTANTS = Key("NAME.KEY", "", "a setting of the method NAME, such as pdf.distance=l1; `yolokd methods` lists them")
CFG = Key("cfg", "none", "a run's distill.yaml: take all settings from it that are not given")
ALSO_TRAIN = "Most other keys of `yolokd train` work, too: see `yolokd train --help`."
ALSO_YOLO_TRAIN = "Every key of `yolo train` works; with a teacher, all but compile=, batch=-1 and distill_model=."
MOST = ("epochs", "imgsz", "batch", "device")

HELP: Mapping[str, Help] = {
    "train": Help(
        (
            "yolokd train teacher=yolov8l.pt student=yolov8n.yaml data=coco8.yaml epochs=100 imgsz=640",
            "yolokd train resume=runs/distill/train",
        ),
        (CONSTANTS, CFG, Key("resume", "False", "continue an interrupted run: its folder; True: the latest")),
        all_training_keys=True,
        ultralytics=(*MOST, "workers", "seed", "optimizer", "lr0", "patience", "amp", "cache", "project", "name"),
        more_keys=ALSO_YOLO_TRAIN,
    ),
    "check": Help(
        (
            "yolokd check teacher=yolov8l.pt student=yolov8n.yaml data=coco8.yaml",
            "yolokd check teacher=yolov8l.pt method=fitnet+pdf pdf.distance=l1 imgsz=320",
        ),
        (CONSTANTS, CFG),
        all_training_keys=True,
        ultralytics=MOST,
        more_keys=ALSO_YOLO_TRAIN,
    ),
    "val": Help(
        (
            "yolokd val model=runs/distill/train/weights/best.pt data=coco8.yaml",
            "yolokd val model=runs/distill/train/weights/best.pt data=shapes split=test",
        ),
        (MODEL, Key("data", "the model's", "a data set's .yaml; shapes: yolokd's drawn data set"), TRUST),
        ultralytics=("split", "imgsz", "batch", "device", "conf", "iou", "save_json", "plots"),
        more_keys="Every key of `yolo val` works.",
    ),
    "predict": Help(
        (
            "yolokd predict model=runs/distill/train/weights/best.pt source=photo.jpg",
            "yolokd predict model=runs/distill/train/weights/best.pt source=images/ conf=0.5 save_txt=True",
        ),
        (MODEL, TRUST),
        ultralytics=("source", "imgsz", "conf", "iou", "device", "classes", "save_txt", "project", "name"),
        more_keys="Every key of `yolo predict` works.",
    ),
    "label": Help(
        (
            "yolokd label teacher=runs/distill/teacher/weights/best.pt source=images/ conf=0.4",
            "yolokd label teacher=t.pt source=d.yaml split=test val=d.yaml name=pseudo",
        ),
        (
            Key("teacher", "", "required: the trained model that labels, a .pt file"),
            SOURCE,
            Key("conf", "0.4", "the least score of a detection that becomes a label"),
            Key("iou", "0.7", "NMS: the largest IoU of two boxes of one class"),
            Key("max_det", "300", "the largest number of labels in an image"),
            Key("classes", "none", "label these classes only, by number: 0,2"),
            Key("imgsz", "none", "the image size in pixels; none: the one that the teacher was trained with"),
            Key("batch", "16", "images at a time"),
            Key("device", "none", "where the teacher runs, such as 0 or cpu"),
            SPLIT,
            Key("val", "none", "a data set's .yaml: its validation images and labels are used for validation"),
            Key("copy", "False", "copy the images; otherwise the data set links to them"),
            Key("project", "runs/label", "the folder in which the data set gets a folder"),
            Key("name", "none", "the name of that folder; none: the source's"),
            TRUST,
        ),
        more_keys="If it is interrupted, repeat the same command to continue.",
    ),
    "export": Help(
        (
            "yolokd export model=runs/distill/train/weights/best.pt format=onnx dynamic=True",
            "yolokd export model=runs/distill/train/weights/best.pt imgsz=320 quantize=16",
        ),
        (
            MODEL,
            Key("format", "onnx", "the file's format; yolokd compares what can be run here with the checkpoint"),
            Key("data", "the model's", "the data set's .yaml: its val images for the check, its train images for INT8"),
            Key("batch", "1", "the number of images in a batch"),
            TRUST,
        ),
        ultralytics=("imgsz", "dynamic", "quantize", "nms", "simplify", "opset", "device"),
        more_keys="Every key of `yolo export` works.",
    ),
    "deploy": Help(
        (
            "yolokd deploy model=runs/distill/train/weights/best.pt limit=0.005",
            "yolokd deploy model=best.pt data=d.yaml formats=onnx-int8,openvino-int8 teacher=t.pt baseline=none.pt",
        ),
        (
            MODEL,
            Key("data", "the model's", "the data set's .yaml: its val images for scores, its train images for INT8"),
            Key("formats", "onnx,onnx-float16,onnx-int8,openvino,openvino-int8,torchscript",
                "what to try: any format of `yolo export`, optionally ending in -float16 or -int8"),
            Key("teacher", "the run's", "a checkpoint to compare with; several: a,b"),
            Key("baseline", "none", "another checkpoint to compare with, trained without a teacher"),
            Key("limit", "none", "refuse what loses more mAP50-95 than this, such as 0.005: exit status 1"),
            Key("imgsz", "none", "the image size in pixels; none: the one that the model was trained with"),
            Key("split", "val", "the split that scores: val, test or train"),
            Key("threads", "none", "CPU threads of the latency; none: as many as a training uses"),
            Key("save_dir", "the run's", "the folder of deploy.csv, deploy.png and the exported files"),
            TRUST,
        ),
        more_keys="If it is interrupted, repeat the same command to continue.",
    ),
    "methods": Help(
        ("yolokd methods", "yolokd train teacher=t.pt method=fitnet+pdf pdf.distance=l1   # use two, set a constant"),
    ),
    "bench": Help(
        (
            "yolokd bench teacher=yolov8l.yaml student=yolov8n.yaml imgsz=320 batch=16 method=none,native,fitnet+pdf",
            "yolokd bench teacher=t.pt data=d.yaml imgsz=320,640 amp=False,bf16 rounds=5 memory=False",
        ),
        (
            Key("teacher", "yolov8l.yaml", "a .pt checkpoint, or a .yaml: random weights; several: a,b"),
            Key("student", "yolov8n.yaml", yolokd_keys()["student"].meaning),
            Key("imgsz", "320", "the image size in pixels; several: 320,640"),
            Key("batch", "16", "images in a batch; several: 8,16"),
            Key("method", "none,native,sl2,dfd,pdf,dfd+pdf,fitnet+pdf",
                "what to measure; none: plain training, native: Ultralytics' own distillation"),
            Key("amp", "none", "the precision of training; several: False,bf16; none: True on CUDA, False elsewhere"),
            Key("rounds", "none", "how many steps of each candidate are measured; none: 40 on CUDA, 7 elsewhere"),
            Key("data", "shapes", "the data set's .yaml"),
            Key("project", "runs/distill", "the folder in which the results get a folder"),
            Key("name", "bench", "the name of that folder"),
            Key("memory", "True", "also measure peak memory, each candidate in a process of its own"),
        ),
        ultralytics=("device", "workers"),
        more_keys=ALSO_TRAIN,
    ),
    "compare": Help(
        (
            "yolokd compare teacher=t.pt student=yolov8n.yaml data=d.yaml method=none,fitnet+pdf seeds=0,1,2 epochs=60",
            "yolokd compare csv=runs/compare/compare.csv   # print and write the results again, without training",
        ),
        (
            TEACHER,
            yolokd_keys()["student"],
            yolokd_keys()["data"],
            Key("method", "none,native,sl2,dfd,pdf,dfd+pdf,fitnet+pdf",
                "what to compare; none: plain training, native: Ultralytics' own distillation"),
            Key("seeds", "0,1,2", "train each method once with each seed"),
            Key("split", "val", "the split that scores the final checkpoints: val, test or train"),
            Key("csv", "PROJECT/compare.csv", "the file that keeps finished runs; alone: show its results"),
            Key("project", "runs/compare", "the folder that holds all runs"),
            Key("device", "none", "where to train; several, such as 0,1, train one run each at the same time"),
            Key("launcher", "local", "ray: train on a Ray cluster, each run on a GPU, or with device=cpu on CPUs"),
            Key("cpus", "1", "with launcher=ray: the number of CPUs, and of threads, of each run"),
        ),
        ultralytics=("epochs", "imgsz", "batch", "workers"),
        more_keys=ALSO_TRAIN,
    ),
    "report": Help(
        (
            "yolokd report run=runs/distill/train",
            "yolokd report csv=runs/compare/compare.csv",
        ),
        (
            Key("run", "", "the folder of a finished run: writes report.html into it"),
            Key("csv", "", "a comparison's compare.csv: writes compare.html beside it"),
            Key("teacher", "the run's", "the teacher's file, if it has moved"),
            Key("data", "the run's", "the data set's .yaml, if it has moved"),
            Key("device", "none", "where the models run, such as 0 or cpu"),
            TRUST,
        ),
        more_keys="Give one of run= and csv=. Training writes a report by itself, unless report=False.",
    ),
    "show": Help(
        (
            "yolokd show teacher=t.pt student=s.pt source=images/ method=dfd,pdf",
            "yolokd show teacher=t.pt student=yolov8n.yaml source=d.yaml split=val count=4",
        ),
        (
            Key("teacher", "", "required: the large model, a .pt file"),
            Key("student", "", "required: the small model; a .yaml has random weights"),
            SOURCE,
            Key("method", "dfd,pdf,frs", "the methods whose maps are drawn, beside the attention of both models"),
            SPLIT,
            Key("imgsz", "none", "the image size in pixels; none: the one that the student was trained with"),
            Key("count", "16", "draw at most so many images, evenly spread"),
            yolokd_keys()["classes_map"],
            Key("device", "none", "where the models run, such as 0 or cpu"),
            Key("project", "runs/distill", "the folder in which the pictures get a folder"),
            Key("name", "show", "the name of that folder"),
            TRUST,
        ),
    ),
    "demo": Help(
        ("yolokd demo", "yolokd demo short=True method=pdf"),
        (
            Key("short", "False", "True: a few images and one epoch each, to try an installation in a minute"),
            Key("seed", "0", "the random seed of all three trainings"),
            Key("method", "fitnet+pdf", "the method that distils; `yolokd methods` lists them"),
        ),
        more_keys="If it is interrupted, repeat the same command to continue.",
    ),
}  # fmt: skip


def print_overview(summaries: Mapping[str, str]) -> None:
    """Print what yolokd is, and one line for each command. summaries: {command: what it does}."""
    CONSOLE.print("yolokd distils a large Ultralytics YOLO into a small one.\n")
    _print_grid((f"yolokd {name}", summary) for name, summary in summaries.items())
    CONSOLE.print("\nExamples:")
    for name in ("train", "check", "export", "compare"):
        CONSOLE.print(f"  {HELP[name].examples[0]}")
    CONSOLE.print("\n`yolokd COMMAND --help` shows a command's keys. Most keys of `yolo train` work, too.")
    CONSOLE.print("--debug shows tracebacks.")


def print_help(name: str, summary: str) -> None:
    """Print what a command does, its own keys, Ultralytics' keys that matter most, and examples."""
    shown = HELP[name]
    CONSOLE.print(f"yolokd {name}: {summary}\n\nExamples:")
    for example in shown.examples:
        CONSOLE.print(f"  {example}")
    if shown.described_keys:
        CONSOLE.print("\nKeys, with their defaults:")
        _print_keys(shown.described_keys)
    if shown.ultralytics:
        CONSOLE.print("\nKeys of Ultralytics that matter most:")
        _print_keys(ultralytics_keys()[key] for key in shown.ultralytics)
    if shown.more_keys:
        CONSOLE.print(f"\n{shown.more_keys}")


def _print_keys(keys: Iterable[Key]) -> None:
    """Print keys with their defaults; long ones, which would be cut into pieces, in the text."""
    rows = []
    for key in keys:
        short = f"{key.name}={key.default}" if key.default else key.name
        long = f"{key.meaning}; by default {key.default.replace(',', ', ')}"
        rows.append((short, key.meaning) if len(short) <= KEY_WIDTH else (key.name, long))
    _print_grid(rows)


def _print_grid(rows: Iterable[tuple[str, str]]) -> None:
    """Print two columns; the second one's text wraps below itself."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column()
    grid.add_column(max_width=KEY_WIDTH, overflow="fold")
    for row in rows:
        grid.add_row("", *row)
    make_console(width=min(CONSOLE.width, MAX_WIDTH)).print(grid)
