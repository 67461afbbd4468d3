"""report.html of a run, made from the files in its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from yolokd.config.defaults import method_defaults
from yolokd.config.schema import DistillationConfig
from yolokd.models.channels import seen_channels
from yolokd.models.detector import dense_heads, image_channels, read_pyramid
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.pyramid.pairing import ClassPairing, Pairing, choose_levels, pair_classes, pair_levels
from yolokd.report import facts, plots
from yolokd.report.history import read_history
from yolokd.report.kept import Kept, read_kept
from yolokd.report.page import MAX_BYTES, render, write_page
from yolokd.report.pictures import classes_by_frequency, photo_uri, view_box
from yolokd.report.run import Run, open_run
from yolokd.report.sections import COLORS, Found, group_views
from yolokd.report.seen.detections import CONF, IOU, detect, in_data_classes, only_classes
from yolokd.report.seen.maps import MapSettings, Observation, observe
from yolokd.report.seen.samples import Boxes, Sample, validation_samples
from yolokd.runtime.files import sha256
from yolokd.version import __version__

NAME = "report.html"


@dataclass(frozen=True)
class Seen:
    """Holds what the models make of some validation images. teacher: None without one."""

    samples: Sequence[Sample]
    teacher: Sequence[Boxes] | None
    student: Sequence[Boxes]
    maps: Observation


def write_report(folder: Path, given: Mapping[str, Any], device: torch.device) -> Path:
    """Make the report of a run, and return its path.

    given: as in `open_run`. Raises UserError for a folder that holds no run, and if a file that it needs is not there.
    """
    run, kept, history = open_run(folder, given), read_kept(folder), read_history(folder)
    pairing = _pair(run)
    seen = _look(run, pairing, device)
    found = facts.result(run, history, kept.record, pairing)
    methods = [method.name for method in run.config.method_configs]
    curves = [plots.score_plot(history, kept.record.teacher_score, run.task), *plots.loss_plots(history, methods)]
    balance: list[plots.Plot | None] = [*plots.balance_plots(history, run.config, int(run.args.epochs))]
    if pairing is not None and pairing.levels[0].teacher_head is not None:  # others have no confidence to share out
        balance.append(plots.share_plot(history))
    content = {
        "title": f"{found.student}, {f'taught by {found.taught_by}' if found.taught_by else 'without a teacher'}",
        "folder": folder.absolute().name,
        "result": found,
        "finished": run.finished,
        "version": __version__,
        "curves": [plot for plot in curves if plot],
        "balance": [plot for plot in balance if plot],
        "deploy": facts.deploy_tables(folder, sha256(run.best)),
        "models": facts.models_table(found),
        "origin": facts.origin_table(run, kept.record),
        "levels": facts.pairing_table(pairing) if pairing is not None else None,
        "classes": _describe_classes(run, pairing),
        "settings": facts.settings_tables(run.settings),
        "conf": CONF,
        "iou": IOU,
        **_pictures(run, pairing, seen),
    }
    return write_page(_fit(content, run, seen, _before(kept, seen.samples)), folder / NAME)


def pdf_distance(config: DistillationConfig) -> str:
    """Return PDF's distance between class predictions in a run; its default if the run has another method."""
    methods = {method.name: method.constants for method in config.method_configs}
    return str(methods.get("pdf", method_defaults("pdf"))["distance"])


def _pair(run: Run) -> Pairing | None:
    """Return how the student is paired with its last teacher, or None without one."""
    if run.teacher is None:
        return None
    strides, teacher = read_pyramid(run.student), detector_teacher(run.teacher)
    heads = {stride: head.shape for stride, head in dense_heads(run.student.model[-1], strides).items()}
    shared = pair_levels(teacher.pyramid, strides, {s: head.shape for s, head in teacher.heads.items()}, heads)
    levels = choose_levels(shared, run.config.levels)
    classes = pair_classes(run.teacher.names, run.names, run.config.classes_map)
    return Pairing(levels, tuple(strides), classes)


def _look(run: Run, pairing: Pairing | None, device: torch.device) -> Seen:
    trust, wanted = run.config.trust, None if run.args.classes is None else list(run.names)
    samples = validation_samples(run.data, run.args, trust)
    student = [only_classes(b, wanted) for b in detect(run.best, samples, run.imgsz, device, trust)]
    teacher = None
    if run.teacher is not None and pairing is not None:
        own = image_channels(run.teacher)
        channels = seen_channels(own, run.data["channels"], run.config.teacher_channels)
        found = detect(Path(run.teacher.pt_path), samples, run.imgsz, device, trust, channels)
        mapped = [in_data_classes(boxes, pairing.classes.mapping) for boxes in found]
        teacher = [only_classes(boxes, wanted) for boxes in mapped]
    paired = pairing.classes if pairing is not None else ClassPairing((), ())
    settings = MapSettings(
        paired, run.imgsz, run.config.teacher_imgsz, run.config.teacher_channels, pdf_distance(run.config)
    )
    return Seen(samples, teacher, student, observe(run.student, run.teacher, samples, settings, device))


def _before(kept: Kept, samples: Sequence[Sample]) -> Mapping[str, Any]:
    """Return the maps before the training if they are of these images."""
    return kept.before if kept.record.images == [sample.file.name for sample in samples] else {}


def _describe_classes(run: Run, pairing: Pairing | None) -> str:
    if run.teacher is None or pairing is None:
        return ""
    return pairing.classes.describe(run.names, run.teacher.names)


def _pictures(run: Run, pairing: Pairing | None, seen: Seen) -> dict[str, Any]:
    """Return what the template needs to show images with boxes."""
    if not seen.samples:
        return {"photos": [], "legend": [], "found": ""}
    objectness = pairing is not None and pairing.classes.objectness
    found = Found(seen.samples, run.data["names"], seen.teacher, seen.student, objectness)
    photos = []
    for number, sample in enumerate(seen.samples):
        frame = sample.frame(run.imgsz)
        name = sample.file.name.encode(errors="replace").decode()
        panels = found.panels(number, frame)
        photos.append(
            {"name": name, "uri": photo_uri(sample), "view": view_box(frame), "frame": frame, "panels": panels}
        )
    everything = [*(sample.labels for sample in seen.samples), *(seen.teacher or ()), *seen.student]
    legend = [(f"k{label % COLORS}", run.data["names"][label]) for label in classes_by_frequency(everything)]
    return {"photos": photos, "legend": legend, "found": found.summary}


def _fit(content: dict[str, Any], run: Run, seen: Seen, before: Mapping[str, Any]) -> str:
    """Return the page with maps of as many levels as MAX_BYTES allow, those with most of the teacher's confidence."""
    shares, levels = seen.maps.shares, list(seen.maps.maps) if seen.samples else []
    ranked = sorted(levels, key=lambda level: -shares.get(level, 0.0))
    methods = [method.name for method in run.config.method_configs]
    for count in range(len(ranked), -1, -1):
        shown = [level for level in levels if level in ranked[:count]]
        maps = {
            "shown_levels": [(level, facts.percent(shares[level]) if level in shares else "") for level in shown],
            "main_level": ranked[0] if ranked else "",
            "has_before": bool(before),
            "groups": group_views(seen.maps, dict(before), shown, methods) if shown else [],
        }
        page = render("report.html.jinja", content | maps)
        if len(page.encode(errors="replace")) <= MAX_BYTES:
            break
    return page
