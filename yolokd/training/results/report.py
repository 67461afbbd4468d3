"""The report of a run: what a training keeps for it at its start, and report.html at its end.

Failures here are warnings, so that they never end a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from ultralytics.utils import LOGGER

from yolokd.data.mixed import MixedDataset
from yolokd.errors import UserError, first_line
from yolokd.models.checkpoint import load_teacher
from yolokd.models.teachers.backbone import is_backbone
from yolokd.pyramid.pairing import ClassPairing
from yolokd.report.kept import Record, Skipped, read_kept, write_kept
from yolokd.report.run_report import pdf_distance, write_report
from yolokd.report.seen.maps import MAP_KINDS, MapSettings, observe
from yolokd.report.seen.samples import validation_samples
from yolokd.runtime.console import warnings_only
from yolokd.runtime.distributed import IS_MAIN
from yolokd.runtime.rng import preserve_random_state
from yolokd.runtime.threads import use_all_cores


def keep_beginning(trainer: Any) -> None:
    """Keep what the report shows of a run before its first step; a failure is only a warning."""
    if IS_MAIN and trainer.plan.config.report:
        # Ultralytics draws some images by chance to time their disk, whenever it lists them.
        without_maps = "the report will go without the maps before the training"
        with _failures_as_warnings(lambda: without_maps), preserve_random_state(), warnings_only():
            if trainer.saved_run is None:
                _keep_beginning(trainer)
            else:
                _take_over(trainer)


def _take_over(trainer: Any) -> None:
    """Keep what a resumed run has kept; if its teacher is now another one, without the former one's score."""
    kept, state = read_kept(trainer.saved_run.folder), trainer.saved_run.state
    same = state is not None and state["teachers"] == [paired.sha256 for paired in trainer.plan.teachers]
    trainer.teacher_score = kept.record.teacher_score if same else None
    if kept.record.images:
        record = kept.record.model_copy(update={"teacher_score": trainer.teacher_score})
        write_kept(Path(trainer.save_dir), record, kept.before)


def _keep_beginning(trainer: Any) -> None:
    plan, config = trainer.plan, trainer.plan.config
    samples = validation_samples(trainer.data, trainer.args, config.trust)
    teacher, classes = None, ClassPairing((), ())
    if detectors := [paired for paired in plan.teachers if not is_backbone(paired.file)]:
        teacher = load_teacher(detectors[-1].file, config.trust)  # again: the plan's is gone, to free its memory
        classes = detectors[-1].pairing.classes
    settings = MapSettings(
        classes, int(trainer.args.imgsz), config.teacher_imgsz, config.teacher_channels, pdf_distance(config)
    )
    names = [name for name, kind in MAP_KINDS.items() if kind.models != "teacher"]
    before = observe(trainer.ema.ema, teacher, samples, settings, trainer.device, names)
    record = Record(
        images=[sample.file.name for sample in samples],
        teacher_score=trainer.teacher_score,
        skipped={"train": _skipped(trainer.train_loader), trainer.args.split: _skipped(trainer.test_loader)},
    )
    write_kept(Path(trainer.save_dir), record, before.maps)


def _skipped(loader: Any) -> Skipped:
    """Return how many of the images of a loader's split are skipped."""
    dataset = loader.dataset.labelled if isinstance(loader.dataset, MixedDataset) else loader.dataset
    total = len(dataset.get_img_files(dataset.img_path))
    return Skipped(images=total - len(dataset.im_files), total=total)


def write_run_report(trainer: Any) -> None:
    """Write report.html of a finished run, if the run is to have one."""
    if not trainer.plan.config.report:
        return
    folder = Path(trainer.save_dir)
    with _failures_as_warnings(lambda: f"make it with: yolokd report run={quote(str(folder.absolute()))}"):
        kept = read_kept(folder)
        scores = {name: float(value) for name, value in trainer.metrics.items() if name.startswith("metrics/")}
        write_kept(folder, kept.record.model_copy(update={"scores": scores}), kept.before)
        config = trainer.plan.config
        given = {"teacher": config.teacher, "data": trainer.args.data, "trust": config.trust}
        LOGGER.info(f"report: {write_report(folder, given, trainer.device)}")
    use_all_cores(trainer.device)  # detecting in the report's images has reset the number of threads


@contextmanager
def _failures_as_warnings(consequence: Callable[[], str]) -> Iterator[None]:
    try:
        yield
    except Exception as e:
        problem = str(e) if isinstance(e, UserError) else f"{type(e).__name__}: {first_line(e)}"
        LOGGER.warning(f"report: {problem}; {consequence()}")
