"""YoloDistiller, the Python face."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.utils import SETTINGS, callbacks

from yolokd.config.parse import merge_cfg_file
from yolokd.data.dataset import with_data_file
from yolokd.errors import UserError
from yolokd.models.checkpoint import Source, as_path, as_paths, load_model
from yolokd.patches.safe_loading import safe_loading
from yolokd.training.settings import training_keys
from yolokd.training.trainer import DistillationTrainer

HOME = Path("runs/distill")  # of runs that are given no other


class YoloDistiller:
    """Distils a teacher into a student, with the verbs of Ultralytics' `YOLO`.

    Teacher and student are paths, loaded `YOLO`/`RTDETR` objects, or modules; several teachers take turns in stages,
    weakest first. Further keys are yolokd's own.

    >>> d = YoloDistiller(teacher="yolov8l.pt", student="yolov8n.yaml", method="dfd", **{"dfd.alpha": 0.5})
    >>> metrics = d.train(data="coco8.yaml", epochs=100)  # doctest: +SKIP
    >>> d.export(format="onnx")  # doctest: +SKIP
    """

    def __init__(
        self,
        teacher: Source | Sequence[Source] | None = None,
        student: Source | None = None,
        method: str | None = None,
        **keys: Any,
    ) -> None:
        given = {"teacher": as_paths(teacher, "teacher"), "student": as_path(student, "student"), "method": method}
        self.keys = keys | {k: v for k, v in given.items() if v is not None}
        self.trainer: DistillationTrainer | None = None
        self._callbacks = callbacks.get_default_callbacks()
        self._model: YOLO | None = None

    def add_callback(self, event: str, function: Callable[[Any], None]) -> None:
        """Call `function(trainer)` at one of Ultralytics' events."""
        self._callbacks[event].append(function)

    def train(self, **kwargs: Any) -> Any:
        """Train, and return Ultralytics' metrics object; keys are those of `yolo train` and yolokd's own.

        Raises UserError, before anything is written, for what cannot work.
        """
        keys = merge_cfg_file({**self.keys, **kwargs})
        overrides = _resumed(keys) if keys.get("resume") else _fresh(keys)
        self.trainer = DistillationTrainer(overrides=overrides, _callbacks=self._callbacks)
        if overrides.get("project") == str(HOME.absolute()):
            self.trainer.args.project = None  # not the user's: loggers would name projects by it, or begin to upload
        self.trainer.train()
        best = self.trainer.best if self.trainer.best.exists() else self.trainer.last
        self._model = load_yolo(best, self.trainer.plan.config.trust)
        metrics = getattr(self.trainer.validator, "metrics", None)
        return metrics if metrics is not None else self._model.ckpt.get("train_metrics")

    @property
    def model(self) -> YOLO:
        """The distilled student, as Ultralytics' own object.

        Raises UserError before training.
        """
        if self._model is None:
            raise UserError("model", "nothing is trained yet", "call .train() first")
        return self._model

    def val(self, **kwargs: Any) -> Any:
        """Ultralytics' validation of the student."""
        with safe_loading(self.trainer is not None and self.trainer.plan.config.trust):
            return self.model.val(**with_data_file(kwargs))

    def predict(self, source: Any = None, **kwargs: Any) -> Any:
        """Ultralytics' predictions of the student."""
        return self.model.predict(source, **kwargs)

    def export(self, **kwargs: Any) -> Path:
        """Export the student (ONNX unless `format=` says otherwise), check parity, and return the file's path.

        Raises RuntimeError where the exported model and torch disagree.
        """
        from yolokd.exporter.export_model import export

        trust = self.trainer is not None and self.trainer.plan.config.trust
        report = export(str(self.model.ckpt_path), **{"trust": trust} | kwargs)
        if not report.passed:
            raise RuntimeError(f"{report.path} does not equal the torch model; see {report.parity}")
        return report.path


def load_yolo(path: str | Path, trust: bool = False) -> YOLO:
    """Ultralytics' `YOLO` object of a checkpoint, loaded under restriction."""
    if str(path).endswith(".pt"):
        load_model(path, "model", trust)
    with safe_loading(trust):
        return YOLO(str(path))


def _fresh(keys: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a new run, which lands in runs/distill unless the keys say otherwise."""
    placed = {} if keys.get("project") or keys.get("save_dir") else {"project": str(HOME.absolute())}
    return {"name": "train"} | placed | training_keys(keys)


def _resumed(keys: dict[str, Any]) -> dict[str, Any]:
    """Overrides of a resumed run: everything else is in its checkpoint."""
    resume, named = keys.pop("resume"), Path(str(keys.get("model") or keys.get("student")))
    if resume is True and named.parts[-2:] == ("weights", "last.pt"):  # as in `yolo train resume=True model=…`
        resume = named
    last = last_checkpoint(resume, keys.get("project"))
    given = {k: v for k, v in keys.items() if k not in {"student", "model"}}
    moved = {"save_dir": str(last.parent.parent)} if last.parent.name == "weights" else {}
    return given | moved | {"resume": str(last), "model": str(last)}


def last_checkpoint(resume: object, project: str | None = None) -> Path:
    """last.pt of a run folder, of a checkpoint's own path, or (True) of the latest run.

    Raises UserError where there is none.
    """
    if resume is True:
        # Ultralytics puts a relative project there
        root = Path(SETTINGS["runs_dir"]) / "detect" / project if project else HOME
        found = sorted(root.glob("*/weights/last.pt"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError("resume=True", f"no run with a checkpoint in {root}", "give resume=path/to/run")
        return found[-1].absolute()
    path = Path(str(resume))
    last = path / "weights" / "last.pt" if path.is_dir() else path
    if not last.is_file():
        raise UserError(f"resume={resume}", "no checkpoint there", "give a run folder with weights/last.pt")
    return last.absolute()
