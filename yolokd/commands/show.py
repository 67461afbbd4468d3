"""`yolokd show`: draws what two models attend to and where they disagree in images, without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from ultralytics.utils.files import increment_path
from ultralytics.utils.torch_utils import select_device

from yolokd.config.arguments import as_list, check_known
from yolokd.config.validate import as_user_error
from yolokd.data.dataset import spread
from yolokd.data.sources import read_source
from yolokd.errors import UserError
from yolokd.models.checkpoint import load_model, load_student, load_teacher, trained_imgsz
from yolokd.models.detector import Detector, check_detector, image_channels, rounded_imgsz
from yolokd.pyramid.pairing import pair_classes, pair_levels
from yolokd.report.pictures import GROUPS, MapGroup
from yolokd.report.seen.maps import MapSettings, observe
from yolokd.report.seen.samples import Sample, read_samples
from yolokd.report.sheet import draw_sheet
from yolokd.runtime.console import CONSOLE, make_progress
from yolokd.runtime.files import check_project
from yolokd.runtime.threads import use_all_cores
from yolokd.training.plan import check_classes_map
from yolokd.training.settings import check_device

IMGSZ = 640  # Ultralytics' default


class ShowSettings(BaseModel):
    """All keys of the command.

    method: whose maps are drawn, beside the attention; None for all. split: of a source that is a data set. imgsz: None
    for the size that the student, or else the teacher, was trained with. count: of images, at most.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    teacher: str
    student: str
    source: str
    method: str | None = None
    split: str | None = None
    imgsz: PositiveInt | None = None
    count: PositiveInt = 16
    classes_map: dict[str, str] | None = None
    device: Any = None
    project: str = "runs/distill"
    name: str = "show"
    trust: bool = False


def run_show(**keys: Any) -> Path:
    """Draw a PNG for each image of a source, and return their folder. keys: the fields of ShowSettings.

    Raises UserError, before anything is written, for what cannot work.
    """
    settings = _check_keys(keys)
    groups = _groups(settings.method)
    device = select_device(check_device(settings.device), verbose=False)
    use_all_cores(device)
    source = read_source("source", settings.source, settings.split, settings.trust)
    project = check_project(settings.project)
    teacher, student = _load(settings)
    channels = image_channels(teacher)
    samples = read_samples(spread(source.images, settings.count), channels)
    if not samples:
        raise UserError(
            f"source={settings.source}",
            "none of its images can be read",
            f"give images of {channels} channels, as the teacher takes",
        )
    check_classes_map(settings.classes_map or {}, [*teacher.names.values()], [*student.names.values()], "the student")
    classes = pair_classes(teacher.names, student.names, settings.classes_map)
    chosen = MapSettings(classes, _imgsz(settings, student, teacher))
    folder = Path(increment_path(project / settings.name, mkdir=True))
    with make_progress() as progress:
        for number, sample in enumerate(progress.track(samples, description="show")):
            seen = observe(student, teacher, [sample], chosen, device, [name for g in groups for name in g.maps])
            path = folder / f"{number:03}-{sample.file.stem}.png"
            draw_sheet(sample, chosen.imgsz, seen.maps, seen.shares, groups, path)
    _say(settings, groups, samples, source.images, folder)
    return folder


def _check_keys(keys: Mapping[str, Any]) -> ShowSettings:
    check_known(keys, ShowSettings.model_fields, "see `yolokd show --help`")
    for key, example in (("teacher", "t.pt"), ("student", "s.pt"), ("source", "images/")):
        if keys.get(key) is None:
            raise UserError(key, "is missing", f"give {key}={example}, for example")
    try:
        return ShowSettings.model_validate({**keys, **{k: str(keys[k]) for k in ("teacher", "student", "source")}})
    except ValidationError as e:
        raise as_user_error(e, keys) from e


def _groups(method: str | None) -> list[MapGroup]:
    """Return the maps of some methods, after those of the attention. Raises UserError for a method without maps."""
    known = [group.method for group in GROUPS if group.method]
    asked = known if method is None else [name for each in as_list(method) for name in str(each).split("+")]
    for name in asked:
        if name not in known:
            raise UserError(f"method={method}", f"{name!r} has no maps to show", f"one of: {', '.join(known)}")
    return [group for group in GROUPS if not group.method or group.method in asked]


def _load(settings: ShowSettings) -> tuple[Detector, Detector]:
    """Return teacher and student. Raises UserError if they share no stride, or take other images."""
    teacher = load_teacher(settings.teacher, settings.trust)
    strides = check_detector(teacher, f"teacher={settings.teacher}")
    channels = image_channels(teacher)
    # A random student that finds poses needs a shape of keypoints; its maps do not depend on it.
    data = {"nc": len(teacher.names), "channels": channels, "kpt_shape": [17, 3]}
    student = load_student(settings.student, data, settings.trust)
    if settings.student.endswith((".yaml", ".yml")):
        student.names = dict(teacher.names)
    if image_channels(student) != channels:
        problem = f"takes {image_channels(student)} channels, the teacher {channels}"
        raise UserError(f"student={settings.student}", problem, "give one that takes the same images")
    pair_levels(strides, check_detector(student, f"student={settings.student}"))
    return teacher, student


def _imgsz(settings: ShowSettings, student: Detector, teacher: Detector) -> int:
    files = [file for model in (student, teacher) if (file := getattr(model, "pt_path", None))]
    trained = (trained_imgsz(load_model(file, "imgsz", settings.trust)[1]) for file in files)
    return rounded_imgsz(settings.imgsz or next(filter(None, trained), IMGSZ), student, teacher)


def _say(
    settings: ShowSettings, groups: Sequence[MapGroup], samples: Sequence[Sample], images: Sequence[Path], folder: Path
) -> None:
    """Print what was drawn, how to read it, and where it is."""
    for group in groups:
        CONSOLE.print(f"{group.title}{f' ({group.method})' if group.method else ''}: {group.shows}")
    if unreadable := min(len(images), settings.count) - len(samples):
        CONSOLE.print(f"{unreadable} images cannot be read: they are left out")
    if len(images) > settings.count:
        CONSOLE.print(f"{len(samples)} of {len(images)} images were drawn, evenly spread; count= draws more")
    CONSOLE.print(folder)
