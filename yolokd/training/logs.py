"""What a training writes beside its checkpoints: log lines, columns of results.csv, distill.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from ultralytics.utils import LOGGER, YAML

from yolokd.config.parse import split_keys
from yolokd.distillation.stage import Stage
from yolokd.pyramid.level import level_name
from yolokd.runtime.files import atomic_path, read_yaml
from yolokd.training.plan import TrainPlan

MEASUREMENTS = ("level/", "clip/", "distill/")  # how the names of yolokd's columns of results.csv begin
LEAST_SHARE = 0.01  # ours: a level with less of the teacher's confidence is as good as not taught
DISTILL_YAML = "distill.yaml"
OF_ONE_RUN = frozenset({"save_dir", "resume", "mode", "task", "cfg"})  # settings that a repeated run must not take


class LossMeans(dict[str, Tensor]):
    """The mean losses of an epoch so far, on the device."""

    def values(self) -> list[float]:  # type: ignore[override]
        """Return numbers; the host waits for a GPU once, and not once for each loss."""
        values: list[float] = torch.stack(list(super().values())).tolist()
        return values


def loss_means(_trainer: Any, means: dict[str, Tensor] | None) -> LossMeans | None:
    """Return what a trainer's `tloss` is to hold instead of Ultralytics' dictionary, whose values it prints."""
    return None if means is None else LossMeans(means)


def with_criterion_items(trainer: Any, items: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Return the `loss_items` of an RT-DETR's trainer with those of yolokd's methods, which Ultralytics leaves out."""
    return items if items is None or trainer.criterion is None else items | trainer.criterion.items


def balance_summary(plan: TrainPlan, means: Mapping[str, float], clip: float, weights: Mapping[str, float]) -> str:
    """Return one log line: what the teacher teaches where, and how hard each method pulls, beside the YOLO loss.

    means: the measurements of an epoch by column name (`P3/pdf_ratio`, `P3/share`, …). clip: the mean factor by which
    the student's gradients were clipped. weights: of the levels.
    """
    shares = {key.partition("/")[0]: v for key, v in means.items() if key.endswith("/share") and not isnan(v)}
    ratios = (
        f"{method.name} " + ", ".join(f"{level} {means[f'{level}/{method.name}_ratio']:.3g}" for level in shares)
        for method in plan.config.method_configs
    )
    config = plan.config
    return (
        f"distillation: {taught_levels(shares, config.level_weights, config.level_floor)}. "
        f"Gradients as multiples of the YOLO loss's: {'; '.join(ratios)}. "
        f"Teacher's confidence by level: {_percentages(shares)}; weights of the levels: {_percentages(weights)}. "
        f"Student's clip coefficient: {clip:.3g} (1: its gradients are not clipped)."
    )


def level_weights(stages: Sequence[Stage]) -> dict[str, float]:
    """Return how much each level counts, by name: a mean over the teachers of some stages."""
    weights: dict[str, float] = {}
    for stage in stages:
        for shape, weight in zip(stage.pairing.levels, stage.level_weights().tolist(), strict=True):
            name = level_name(shape.stride)
            weights[name] = weights.get(name, 0.0) + weight / len(stages)
    return dict(sorted(weights.items()))


def taught_levels(shares: Mapping[str, float], level_weights: str, level_floor: float = 0.0) -> str:
    """Return in words at which levels the teacher is confident, and what that means for the student.

    shares: {name of a level: the teacher's share of confidence there}. The other two are settings.

    >>> taught_levels({"P3": 0.995, "P4": 0.003, "P5": 0.002}, "confidence")
    'the teacher sees objects at P3 only: P4 and P5 are not taught'
    >>> taught_levels({"P3": 0.6, "P4": 0.396, "P5": 0.004}, "uniform")
    'the teacher sees objects at P3 and P4 only; level_weights=uniform teaches P5, too'
    >>> taught_levels({"P3": 0.995, "P4": 0.003, "P5": 0.002}, "confidence", 0.3)
    'the teacher sees objects at P3 only; level_floor=0.3 teaches P4 and P5, too'
    """
    seen = [level for level, share in shares.items() if share >= LEAST_SHARE]
    unseen = [level for level in shares if level not in seen]
    if not unseen or not seen:
        return "the teacher teaches at all levels"
    where = f"the teacher sees objects at {_and(seen)} only"
    if level_weights == "uniform" or level_floor / len(shares) >= LEAST_SHARE:
        setting = "level_weights=uniform" if level_weights == "uniform" else f"level_floor={level_floor:g}"
        return f"{where}; {setting} teaches {_and(unseen)}, too"
    return f"{where}: {_and(unseen)} {'is' if len(unseen) == 1 else 'are'} not taught"


def _percentages(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2%}" for name, value in values.items())


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def distillation_metrics(means: Mapping[str, float], clip: float, dropped: int) -> dict[str, float]:
    """Return yolokd's columns of results.csv. dropped: from NonFiniteGuard.end_epoch, summed over processes."""
    levels = {f"level/{name}": value for name, value in means.items()}
    return levels | {"clip/student": clip, "distill/dropped": dropped}


def add_measurements(trainer: Any, metrics: Mapping[str, Any], dropped: int) -> dict[str, Any]:
    """Return the metrics of an epoch with yolokd's columns, and log what these mean.

    The trainer's own metrics get them, too, because TensorBoard, MLflow and other loggers log those.
    dropped: what NonFiniteGuard.end_epoch returned, summed over processes.
    """
    clip, means = trainer.steps.mean_clip_coefficient(), trainer.criterion.recorder.means()
    LOGGER.info(balance_summary(trainer.plan, means, clip, level_weights(trainer.criterion.taught)))
    measured = distillation_metrics(means, clip, dropped)
    trainer.metrics = without_measurements(trainer.metrics) | measured
    return without_measurements(metrics) | measured


def without_measurements(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics without yolokd's columns, which stay from the epoch before if there was no validation."""
    return {name: value for name, value in metrics.items() if not name.startswith(MEASUREMENTS)}


def without_distillation(labels: Any, prefix: str, plan: TrainPlan) -> Any:
    """Return a list or dict of labelled loss items without yolokd's (`val/dfd_loss`, …): a validation has none."""
    methods = [method.name for method in plan.config.method_configs]
    distillation = {f"{prefix}/{name}_{item}" for name in methods for item in ("loss", "gain")}
    kept = [label for label in labels if label not in distillation]
    return kept if isinstance(labels, list) else {label: labels[label] for label in kept}


def rotate_results_csv(path: Path, metrics: Mapping[str, Any], epoch: int) -> None:
    """Rename results.csv if its columns changed, as with another method after a resume.

    Otherwise Ultralytics would append rows that do not fit the header.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8") as f:
        columns = f.readline().strip().split(",")
    if columns != ["epoch", "time", *metrics]:
        path.rename(path.with_stem(f"results-to-{epoch}"))


def write_distill_yaml(save_dir: Path, keys: Mapping[str, Any], resumed: Path | None = None) -> None:
    """Write distill.yaml, from which `yolokd train cfg=` repeats the run.

    keys: yolokd's own, and the run's name. resumed: the folder of the run that goes on, whose distill.yaml keeps the
    run's name and Ultralytics' settings, as the run began with them.
    """
    begun = read_yaml(resumed / DISTILL_YAML) if resumed is not None else {}
    settings = split_keys(begun or read_yaml(save_dir / "args.yaml")).ultralytics
    repeated = {key: value for key, value in settings.items() if key not in OF_ONE_RUN}
    with atomic_path(save_dir / DISTILL_YAML) as temporary:
        YAML.save(temporary, dict(keys) | repeated if begun else repeated | dict(keys))
