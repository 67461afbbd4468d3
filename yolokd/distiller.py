"""The Python interface: YoloDistiller, and a trainer for Ultralytics' own `YOLO.train`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ultralytics import YOLO
from ultralytics.utils import DEFAULT_CFG, LOGGER, SETTINGS, callbacks

from yolokd.config.parse import merge_cfg_file, without_replaced
from yolokd.data.dataset import with_data_file
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model
from yolokd.models.model_objects import Source, as_path, as_paths
from yolokd.models.tasks import YOLO_TASKS
from yolokd.patches.safe_loading import safe_loading
from yolokd.training.resume.sidecar import is_trained
from yolokd.training.settings import training_keys
from yolokd.training.tasks import make_trainer
from yolokd.training.trainer import DistillationTrainer

DEFAULT_PROJECT = Path("runs/distill")  # the folder of runs whose keys name none


class YoloDistiller:
    """Distils a teacher into a student, with the methods of Ultralytics' `YOLO`: train, val, predict, export.

    teacher, student: paths, loaded `YOLO`/`RTDETR` objects, or modules. With a list of teachers, weakest first, each
    teaches for a part of the training. keys: defaults for `train`.

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
        named = {"teacher": as_paths(teacher, "teacher"), "student": as_path(student, "student"), "method": method}
        self.keys = keys | {k: v for k, v in named.items() if v is not None}
        self.trainer: DistillationTrainer | None = None
        self._callbacks = callbacks.get_default_callbacks()
        self._model: YOLO | None = None

    def add_callback(self, event: str, function: Callable[[Any], None]) -> None:
        """Call `function(trainer)` at an event of Ultralytics' training, for example `on_train_epoch_end`."""
        self._callbacks[event].append(function)

    def train(self, **kwargs: Any) -> Any:
        """Train, and return Ultralytics' metrics object.

        kwargs: keys of `yolo train` and of yolokd; they override those of the constructor. Raises UserError for what
        cannot work, before anything is written.
        """
        keys = merge_cfg_file({**without_replaced(self.keys, kwargs), **kwargs})
        overrides = _resume_overrides(keys) if keys.get("resume") else _new_run_overrides(keys)
        self.trainer = make_trainer(overrides, self._callbacks)
        if overrides.get("project") == str(DEFAULT_PROJECT.absolute()):
            self.trainer.args.project = (
                None  # the user gave no project, and loggers would name theirs by it, or upload the run
            )
        self.trainer.train()
        best = self.trainer.best if self.trainer.best.exists() else self.trainer.last
        self._model = load_yolo(best, self.trainer.plan.config.trust)
        metrics = getattr(self.trainer.validator, "metrics", None)
        return metrics if metrics is not None else self._model.ckpt.get("train_metrics")

    @property
    def model(self) -> YOLO:
        """Return the trained student as an Ultralytics `YOLO` object.

        Raises UserError if nothing is trained yet.
        """
        if self._model is None:
            raise UserError("model", "nothing is trained yet", "call .train() first")
        return self._model

    @property
    def _trust(self) -> bool:
        return self.trainer is not None and bool(self.trainer.plan.config.trust)

    def val(self, **kwargs: Any) -> Any:
        """Validate the student with Ultralytics, and return its metrics object; keys are those of `yolo val`."""
        with safe_loading(self._trust):
            return self.model.val(**with_data_file(kwargs))

    def predict(self, source: Any = None, **kwargs: Any) -> Any:
        """Return Ultralytics' predictions of the student, a generator with `stream=True`; keys as in `yolo predict`."""
        trust = self._trust
        with safe_loading(trust):
            results = self.model.predict(source, **kwargs)
        return _iterate_safely(results, trust) if kwargs.get("stream") else results

    def export(self, **kwargs: Any) -> Path:
        """Export the student, compare the file with the checkpoint, and return its path.

        kwargs: keys of `yolo export`; the default is format="onnx". Raises RuntimeError if the file's results differ
        from the checkpoint's, and UserError as `yolokd.exporter.export` does.
        """
        from yolokd.exporter.export_model import export

        report = export(str(self.model.ckpt_path), **{"trust": self._trust} | kwargs)
        if not report.passed:
            raise RuntimeError(f"{report.path}: its results differ from the checkpoint's; see {report.parity}")
        return report.path


def distillation_trainer(**keys: Any) -> Callable[..., DistillationTrainer]:
    """Return a trainer for Ultralytics' extension point, `YOLO(...).train(trainer=...)`, with yolokd's keys bound.

    >>> from ultralytics import YOLO
    >>> trainer = distillation_trainer(teacher="yolov8l.pt", method="dfd")
    >>> YOLO("yolov8n.yaml").train(data="coco8.yaml", trainer=trainer)  # doctest: +SKIP
    """

    def build(
        cfg: Any = DEFAULT_CFG, overrides: dict[str, Any] | None = None, _callbacks: dict[str, Any] | None = None
    ) -> DistillationTrainer:
        return make_trainer({**(overrides or {}), **keys}, _callbacks, cfg=cfg)

    return build


def load_yolo(path: str | Path, trust: bool = False) -> YOLO:
    """Return the `YOLO` object of a model file; trust=True allows a checkpoint that could run code.

    Raises UserError for a .pt that is missing, broken or not trusted.
    """
    if str(path).endswith(".pt"):
        load_model(path, "model", trust)
    with safe_loading(trust):
        return YOLO(str(path))


def _iterate_safely(results: Iterator[Any], trust: bool) -> Iterator[Any]:
    """Yield results that Ultralytics computes one by one, with safe loading while it computes."""
    end = object()
    while True:
        with safe_loading(trust):
            result = next(results, end)
        if result is end:
            return
        yield result


def _new_run_overrides(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's overrides for a new run, by default in runs/distill."""
    project = {} if keys.get("project") or keys.get("save_dir") else {"project": str(DEFAULT_PROJECT.absolute())}
    return {"name": "train"} | project | training_keys(keys)


def _resume_overrides(keys: dict[str, Any]) -> dict[str, Any]:
    """Return the trainer's overrides for a resumed run; all other settings are in its checkpoint."""
    resume, model = keys.pop("resume"), Path(str(keys.get("model") or keys.get("student")))
    if resume is True and model.parts[-2:] == ("weights", "last.pt"):  # as in `yolo train resume=True model=…`
        resume = model
    last = last_checkpoint(resume, keys.get("project"))
    if keys.get("student") and Path(str(keys["student"])).absolute() != last:
        LOGGER.warning(f"student={keys['student']} is ignored: a resumed run has the student of its checkpoint")
    settings = {k: v for k, v in keys.items() if k not in {"student", "model"}}
    return settings | {"resume": str(last), "model": str(last)}


def last_checkpoint(resume: object, project: str | None = None) -> Path:
    """Return the absolute path of the last.pt to resume from.

    resume: a run folder, a checkpoint, or True for the latest run in `project` that is not finished.
    Raises UserError if there is none.
    """
    if resume is True:
        # Ultralytics puts a relative project into runs/detect, runs/segment, ….
        runs = Path(SETTINGS["runs_dir"])
        roots = [runs / task / project for task in YOLO_TASKS] if project else [DEFAULT_PROJECT]
        found = [path for root in dict.fromkeys(roots) for path in root.glob("*/weights/last.pt")]
        checkpoints = sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)
        unfinished = next(filter(_is_unfinished, checkpoints), None)
        if unfinished is None:
            raise UserError("resume=True", f"no unfinished run in {roots[-1]}", "give resume=path/to/run")
        return unfinished.absolute()
    path = Path(str(resume))
    last = path / "weights" / "last.pt" if path.is_dir() else path
    if not last.is_file():
        raise UserError(f"resume={resume}", "no checkpoint there", "give a run folder with weights/last.pt")
    return last.absolute()


def _is_unfinished(last: Path) -> bool:
    """Return whether a run can go on; a broken last.pt counts, since the error of its resume says what is wrong."""
    try:
        return not is_trained(last)
    except UserError:
        return True
