"""Plan a run that may be a resumed one: settings that are given go before those that were saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ultralytics.utils import LOCAL_RANK
from ultralytics.utils.torch_utils import torch_distributed_zero_first

from yolokd.config.parse import check_keys, is_yolokd_key, split_keys
from yolokd.config.ultralytics_keys import KNOWN_KEYS
from yolokd.data.dataset import data_file
from yolokd.data.shape_labels import SHAPE_SETS
from yolokd.training.plan import TrainPlan, check_data, make_plan, with_unlabelled_images
from yolokd.training.resume.same_run import check_same_run
from yolokd.training.resume.saved_run import SavedRun

# What Ultralytics' BaseTrainer.check_resume lets change; it ignores other keys, with a warning.
CHANGEABLE_OF_ULTRALYTICS = frozenset({
    "imgsz", "batch", "device", "close_mosaic", "augmentations", "save_period", "workers", "cache", "patience", "time",
    "freeze", "val", "plots", "channels_last", "save_dir", "data",
})  # fmt: skip


def merge_keys(cfg: Any, keys: Mapping[str, Any], saved_run: SavedRun | None) -> dict[str, Any]:
    """Return the flat keys of the run: those given, over a resumed checkpoint's, over those of Ultralytics' `cfg`."""
    base = {k: v for k, v in (dict(cfg) if isinstance(cfg, dict) else {}).items() if k in KNOWN_KEYS}
    if saved_run is None:
        return base | dict(keys)
    saved = split_keys(saved_run.keys)
    saved_settings = {k: v for k, v in saved.ultralytics.items() if k in KNOWN_KEYS}
    given = {k: v for k, v in keys.items() if v is not None and (is_yolokd_key(k) or k in CHANGEABLE_OF_ULTRALYTICS)}
    last, folder = str(saved_run.last), str(saved_run.folder)
    return base | saved_settings | saved.distillation | {"save_dir": folder} | given | {"model": last, "resume": last}


def ultralytics_settings(keys: Mapping[str, Any], saved_run: SavedRun | None) -> dict[str, Any]:
    """Return the settings that Ultralytics' constructor gets: those given, with paths for a data set and a resumed run.

    A resumed run writes where its checkpoint lies, not into the folder that is written inside the checkpoint.
    """
    settings = split_keys(keys).ultralytics
    if saved_run is not None:
        settings.setdefault("save_dir", str(saved_run.folder))
    if settings.get("data") in SHAPE_SETS or (settings.get("data") is None and saved_run is None):
        settings["data"] = data_file(settings.get("data"))
    return settings


def device_of_run(keys: Mapping[str, Any], saved_run: SavedRun | None) -> object:
    """Return the `device` that is given, or else the one that a resumed run began with."""
    device = keys.get("device")
    return saved_run.keys.get("device") if device is None and saved_run is not None else device


def plan_run(cfg: Any, keys: Mapping[str, Any], saved_run: SavedRun | None) -> TrainPlan:
    """Plan and check a run in every process; the first one goes ahead, since it may have to download.

    Raises UserError for what cannot work, and for a resumed run that would be another one.
    """
    check_keys(keys, KNOWN_KEYS)  # before those that a resume ignores are dropped
    with torch_distributed_zero_first(LOCAL_RANK):
        plan = make_plan(merge_keys(cfg, keys, saved_run))
        if saved_run is not None:
            check_same_run(plan, saved_run)
        check_data(plan)
        return with_unlabelled_images(plan)
