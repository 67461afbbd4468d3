"""`yolokd deploy`: measures a checkpoint in each format, and says which ones lose too much."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TimeElapsedColumn
from ultralytics.utils.cpu import CPUInfo
from ultralytics.utils.torch_utils import is_qat

from yolokd.commands.deploy import ledger
from yolokd.commands.deploy.formats import Format, parse_formats
from yolokd.commands.deploy.ledger import CHECKPOINT, STUDENT, DeployRow, Rows
from yolokd.commands.deploy.measure import Measurement, Say
from yolokd.commands.deploy.places import Places, run_of
from yolokd.commands.deploy.references import find_references
from yolokd.commands.deploy.settings import DeploySettings, check_deploy_settings
from yolokd.commands.deploy.show import print_rows, save_plot
from yolokd.data.dataset import load_data, split_images
from yolokd.data.fingerprint import files_hash
from yolokd.errors import UserError
from yolokd.exporter.export_model import choose_data
from yolokd.models.checkpoint import Checkpoint, load_model, trained_imgsz
from yolokd.models.detector import Detector, check_detector, describe_kind, rounded_imgsz
from yolokd.models.origin import origin_of, versions
from yolokd.models.tasks import TASKS, task_of
from yolokd.pyramid.pairing import pair_classes
from yolokd.runtime.console import CONSOLE, make_progress, quiet
from yolokd.runtime.files import sha256
from yolokd.runtime.lock import held
from yolokd.runtime.threads import training_threads, use_all_cores


def run_deploy(**keys: Any) -> bool:
    """Measure a checkpoint and its exports; print a table and write deploy.csv, deploy.png and the exported files.

    keys: the fields of DeploySettings. Rows that are in deploy.csv are not measured again, so that a command that was
    interrupted goes on. Returns whether all exports agree with the checkpoint and lose no more than `limit`.
    Raises UserError for wrong keys, before anything is written, and if the checkpoint itself cannot be measured.
    """
    settings = check_deploy_settings(keys)
    module, checkpoint = load_model(settings.model, "model", settings.trust)
    formats = choose_formats(settings, module)
    measurement, validation = _conditions(settings, module, checkpoint)
    file = Path(module.pt_path)  # Ultralytics also looks in its folder of weights
    places = Places.of(file, settings.save_dir)
    references = find_references(settings, module, run_of(file))
    places.folder.mkdir(parents=True, exist_ok=True)
    with _locked(places.folder):
        deployment = Deployment(places, measurement, validation)
        with quiet():
            shown = deployment.run(file, formats, references)
        save_plot(shown, places.plot, settings.limit)
    if older := ledger.other_versions(shown, versions()):
        CONSOLE.print(f"rows that were measured before, with {older}, are kept; another save_dir= measures anew")
    return print_rows(shown, settings.limit, places)


def choose_formats(settings: DeploySettings, module: Detector) -> list[Format]:
    """Return the formats to measure. A student that was trained in INT8 has no others: all its exports are in INT8.

    Raises UserError for an unknown format, and if none is left.
    """
    formats = parse_formats(settings.formats)
    if not is_qat(module):
        return formats
    kept = [each for each in formats if each.precision == "int8"]
    if not kept:
        problem = "are not for a student that was trained with quantize=8: all its exports are in INT8"
        raise UserError(f"formats={','.join(settings.formats)}", problem, "give formats=onnx-int8")
    return kept


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. Raises UserError if another deployment holds it."""
    refusal = UserError(f"save_dir={folder}", "another deployment is writing here", "wait until it ends")
    with held(folder / ".deploy.lock", refusal):
        try:
            yield
        except KeyboardInterrupt as e:
            raise KeyboardInterrupt("repeat the same command to continue") from e


def _conditions(settings: DeploySettings, module: Detector, checkpoint: Checkpoint) -> tuple[Measurement, str]:
    """Return the conditions of all rows, and a hash of the images that score them.

    Raises UserError if the model is no detector, or if its classes are not the data set's.
    """
    argument = f"model={settings.model}"
    check_detector(module, argument)
    task = task_of(module)
    if task is None:
        raise UserError(argument, f"is {describe_kind(module)}", f"give a model of the tasks {', '.join(TASKS)}")
    data = choose_data(settings.data, checkpoint)
    single_cls = bool(checkpoint.get("train_args", {}).get("single_cls"))
    content = load_data(data, single_cls, split=settings.split, trust=settings.trust)
    names = content["names"]
    if pair_classes(module.names, names).mapping != {i: (i,) for i in names} or len(module.names) != len(names):
        problem = f"its classes are not those of the data set: {', '.join(names.values())}"
        raise UserError(argument, problem, "give data= the data set that it was trained on")
    imgsz = rounded_imgsz(settings.imgsz or trained_imgsz(checkpoint) or 640, module)
    threads = settings.threads or training_threads()
    shared = Measurement(
        data, content, task, settings.split, imgsz, threads, settings.trust, single_cls, origin_of(module)
    )
    return shared, files_hash(split_images(content[settings.split]))[:12]


class Deployment:
    """The rows of one deploy.csv, which grows with each model and format that is measured."""

    def __init__(self, places: Places, measurement: Measurement, validation: str) -> None:
        self._places, self._measurement, self._validation = places, measurement, validation
        self._rows: Rows = ledger.read(places.csv)

    def run(
        self, checkpoint: Path, formats: Sequence[Format], references: Sequence[tuple[str, Path]]
    ) -> list[DeployRow]:
        """Measure all models and formats that have no row yet; return the rows of all.

        Raises UserError if the rows of deploy.csv are those of another checkpoint, or were measured otherwise, and if
        the checkpoint itself cannot be measured.
        """
        student = self._new_row(STUDENT, CHECKPOINT, checkpoint)
        ledger.check_same(self._rows, student, self._places.csv)
        self._places.exports.mkdir(exist_ok=True)
        use_all_cores(torch.device("cpu"))
        planned: list[tuple[DeployRow, Path, Format | None]] = [(student, checkpoint, None)]
        planned += [(self._new_row(STUDENT, each.name, checkpoint), checkpoint, each) for each in formats]
        planned += [(self._new_row(role, CHECKPOINT, file), file, None) for role, file in references]
        with make_progress(BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()) as progress:
            task = progress.add_task("deploy", total=len(planned))
            for row, file, each in planned:

                def say(what: str, name: str = row.name) -> None:
                    progress.update(task, description=f"{name}: {what}")

                self._measure(row, file, each, say)
                if row is student and (problem := self._rows[row.key].problem):
                    raise UserError(
                        f"model={checkpoint}",
                        problem,
                        "give a checkpoint that runs and can be scored here: every format is compared with it",
                    )
                progress.advance(task)
        return [self._rows[row.key] for row, _, _ in planned]

    def _measure(self, row: DeployRow, file: Path, each: Format | None, say: Say) -> None:
        """Measure a model, in a format or as it is, unless there is a row of it; write deploy.csv."""
        kept = self._rows.get(row.key)
        if kept is not None and not kept.problem and (each is None or (self._places.exports / kept.file).exists()):
            return
        if each is None:
            row = self._measurement.checkpoint(row, file, say)
        else:
            row = self._measurement.exported(row, file, each, self._places.exports, say)
        reference = self._rows.get((STUDENT, CHECKPOINT, ""), row)
        self._rows[row.key] = row.compared(reference)
        ledger.write(self._rows.values(), self._places.csv)

    def _new_row(self, model: str, form: str, checkpoint: Path) -> DeployRow:
        shared = self._measurement
        described: dict[str, Any] = {"model": model, "format": form, "file": checkpoint.name, **versions()}
        conditions = {"split": shared.split, "imgsz": shared.imgsz, "threads": shared.threads}
        conditions |= {"processor": CPUInfo.name()}
        described |= conditions | {"data": Path(shared.data).name, "validation": self._validation}
        return DeployRow(**described, sha256=sha256(checkpoint))
