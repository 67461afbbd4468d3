"""One run of a comparison: trained, and scored, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import polars as pl
from filelock import FileLock, Timeout
from ultralytics.data.utils import img2label_paths
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG_DICT

from yolokd.commands.candidates import NATIVE
from yolokd.commands.compare.ledger import TEACHER, LedgerRow
from yolokd.config.parse import is_yolokd_key
from yolokd.config.schema import teacher_files
from yolokd.data.dataset import load_data, split_images
from yolokd.distiller import YoloDistiller
from yolokd.models.checkpoint import load_model, load_teacher
from yolokd.models.evaluate import aligned_copy, score
from yolokd.patches.safe_loading import safe_loading
from yolokd.patches.training_loop import bfloat16_on_cpu
from yolokd.pyramid.pairing import pair_classes
from yolokd.runtime.files import atomic_path
from yolokd.training.provenance import versions
from yolokd.training.sidecar import sidecars

FILES = frozenset({"teacher", "student", "data"})  # keys that name files; a run is known by what those hold
# What does not change a score by intent: where and how fast a run runs, and what it shows.
SCORE_NEUTRAL_KEYS = frozenset(
    {"device", "workers", "channels_last", "plots", "verbose", "check_teacher", "trust", "force", "save_period"}
)

NMS_SETTINGS = ("iou", "max_det", "agnostic_nms")  # settings of how boxes count, also in the validations of a training


@dataclass(frozen=True)
class ComparisonRun:
    """A method with a seed: its keys of training, and what identifies it."""

    method: str
    seed: int
    split: str
    keys: Mapping[str, Any]  # of `yolokd train`, without seed, device and save_dir
    config: str  # a hash of what shapes the training, but for the seed
    ground: str  # a hash of what it has in common with those that it may be compared with, and of what scores it
    teacher_row: str  # the hash of the run that scores its teacher; empty without
    project: Path

    @property
    def folder(self) -> Path:
        """The run's own, the same each time: what was cut off there goes on."""
        return self.project / f"{self.method}-seed{self.seed}-{self.config}"

    @property
    def hash(self) -> str:
        """Of the training and of what it is scored on."""
        return digest([self.config, self.ground, self.seed])

    @property
    def scores_path(self) -> Path:
        """Where the process leaves its scores."""
        return self.folder / f"scores-{self.split}-{self.ground}.json"

    @property
    def epochs(self) -> int:
        """How many its training has."""
        return 0 if self.method == TEACHER else int(self.keys.get("epochs", DEFAULT_CFG_DICT["epochs"]))

    def epochs_done(self) -> int:
        """How many epochs results.csv holds."""
        results = self.folder / "results.csv"
        return max(sum(1 for _ in open(results, "rb")) - 1, 0) if results.exists() else 0


def digest(content: object) -> str:
    """A short hash of what JSON can hold, and of the words for what it cannot."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def fingerprint(data: Mapping[str, Any], *splits: str) -> str:
    """A hash of a data set's classes, and of some splits' images (names and sizes) and labels."""
    content = hashlib.sha256(json.dumps(sorted(data["names"].items())).encode())
    for split in splits:
        for image in sorted(split_images(data[split])) if data.get(split) else ():
            content.update(f"{split}/{image.name} {image.stat().st_size}".encode())
            label = Path(img2label_paths([str(image)])[0])
            content.update(label.read_bytes() if label.exists() else b"")
    return content.hexdigest()


def execute_run(run: ComparisonRun, device: object) -> None:
    """Train and score in a new process, which leaves scores and a log in the run's folder, unless scores are there.

    Raises RuntimeError, naming the log, where it fails; and where another comparison is at this run.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run.folder / ".lock", timeout=0):  # two trainings in one folder would end both
            if not run.scores_path.exists():
                _in_a_process(run, device)
    except Timeout as e:
        raise RuntimeError(
            f"{run.method} with seed {run.seed} is at work in another comparison; repeat this one when that is done"
        ) from e


def _in_a_process(run: ComparisonRun, device: object) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_train_and_score, args=(run, device))
    process.start()
    process.join()
    if process.exitcode != 0 or not run.scores_path.exists():
        log = run.folder / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "before it could log anything")
        raise RuntimeError(
            f"{run.method} with seed {run.seed} failed: {last} (exit code {process.exitcode}; its log is {log})"
        )


def kill_running() -> None:
    """End the processes at work; their runs go on from their last checkpoints another time."""
    for process in multiprocessing.active_children():
        process.kill()


def _end_with_parent() -> None:
    """A run left alone would train into a folder that the next comparison takes up."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _train_and_score(run: ComparisonRun, device: object) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(run.folder / "log.txt", "ab") as log:  # by descriptor: loggers hold the old streams
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with bfloat16_on_cpu(), safe_loading(bool(run.keys.get("trust"))):
        if run.method == TEACHER:
            model: Any = _aligned_teacher(run)
        else:
            if run.method == NATIVE:
                _repair_half_written(run)
            if not _is_trained(run):
                _train(run, device)
            best = run.folder / "weights" / "best.pt"
            model = load_model(best if best.exists() else best.with_name("last.pt"), "model")[0]
            model = getattr(model, "student_model", model)  # Ultralytics' own, cut off before it takes the teacher out
        settings = {k: run.keys[k] for k in ("data", "imgsz", "workers", "single_cls", *NMS_SETTINGS) if k in run.keys}
        settings |= {"batch": 2 * run.keys.get("batch", 16), "device": device, "split": run.split, "save_json": True}
        found = score(model, settings, run.folder)
    with atomic_path(run.scores_path) as path:
        path.write_text(json.dumps({**asdict(found), **versions()}), encoding="utf-8")


def _aligned_teacher(run: ComparisonRun) -> Any:
    """The teacher, with the data set's classes."""
    trust = bool(run.keys.get("trust"))
    model = load_teacher(run.keys["teacher"], trust)
    names = load_data(run.keys["data"], bool(run.keys.get("single_cls")), trust=trust)["names"]
    return aligned_copy(model, names, pair_classes(model.names, names).mapping)


def _repair_half_written(run: ComparisonRun) -> None:
    """Of a native run, killed while Ultralytics wrote last.pt in place, or the same once more as best.pt.

    Without last.pt it begins anew.
    """
    last, best = (run.folder / "weights" / name for name in ("last.pt", "best.pt"))
    if last.exists() and not is_zipfile(last):
        last.unlink()
    elif last.exists() and best.exists() and not is_zipfile(best):
        with atomic_path(best) as path:
            shutil.copyfile(last, path)


def _is_trained(run: ComparisonRun) -> bool:
    last = run.folder / "weights" / "last.pt"
    if not last.exists():
        return False
    _, checkpoint = load_model(last, "resume")
    done = int(checkpoint.get("epoch", -1))
    if run.method == NATIVE:  # Ultralytics does not resume a final evaluation
        return done < 0 or done + 1 >= run.epochs
    return done < 0 and not sidecars(last)


def _train(run: ComparisonRun, device: object) -> None:
    last = run.folder / "weights" / "last.pt"
    placed = {"save_dir": str(run.folder), "seed": run.seed, "device": device}
    if run.method != NATIVE:
        files = {k: run.keys[k] for k in ("teacher", "data") if k in run.keys}  # they may lie elsewhere by now
        resumed = {"resume": str(run.folder), "trust": bool(run.keys.get("trust")), "device": device, **files}
        YoloDistiller().train(**(resumed if last.exists() else {**run.keys, **placed}))
        return
    # Also of what goes on: a checkpoint knows where things lay.
    placed |= {"distill_model": run.keys["teacher"], "data": run.keys["data"]}
    if last.exists():
        own = {"model": str(last), "resume": str(last)}
    else:
        own = {k: v for k, v in run.keys.items() if not is_yolokd_key(k) and k != "student"} | {
            "model": run.keys["student"]
        }
    DetectionTrainer(overrides=own | placed).train()


def make_row(run: ComparisonRun, images: int) -> LedgerRow:
    """The ledger's row of a run that left its scores. images: of an epoch of training."""
    found = json.loads(run.scores_path.read_text(encoding="utf-8"))
    curve, seconds = _history(run.folder / "results.csv")
    keys = run.keys
    own = {k: v for k, v in keys.items() if k not in FILES | SCORE_NEUTRAL_KEYS | {"method"}}
    return LedgerRow(
        hash=run.hash,
        config=run.config,
        ground=run.ground,
        teacher_row=run.teacher_row,
        method=run.method,
        seed=run.seed,
        split=run.split,
        teacher=" ".join(Path(t).name for t in teacher_files(keys.get("teacher"))),
        student=Path(str(keys["student"])).name if run.method != TEACHER else "",
        data=Path(str(keys["data"])).name,
        settings=" ".join(f"{k}={v}".replace(" ", "") for k, v in sorted(own.items())),
        **found,
        seconds=round(seconds, 1),
        images_per_second=round(images * len(curve) / seconds, 3) if seconds else 0.0,
        curve=" ".join(f"{v:.4f}" for v in curve),
    )


def _history(results: Path) -> tuple[list[float], float]:
    """mAP50-95 of each epoch, and the seconds of all of them; a resume starts Ultralytics' clock anew."""
    if not results.exists():
        return [], 0.0
    table = pl.read_csv(results, infer_schema_length=None)
    clock = [0.0, *table["time"].to_list()]
    spent = sum(now - before if now >= before else now for before, now in pairwise(clock))
    epochs = table.unique("epoch", keep="last", maintain_order=True)  # one cut off before its checkpoint was done again
    return epochs["metrics/mAP50-95(B)"].to_list(), spent
