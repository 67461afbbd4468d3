"""Launchers: they execute the runs of a comparison, on devices of this machine or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from importlib.util import find_spec

from pydantic import PositiveInt

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers.execution import Execution
from yolokd.commands.compare.launchers.local import launch_locally
from yolokd.config.arguments import as_list, did_you_mean
from yolokd.config.validate import validate
from yolokd.errors import UserError
from yolokd.training.settings import check_device

LOCAL, RAY = "local", "ray"
DEFAULT_CPUS = 1
Launcher = Callable[[Sequence[ComparisonRun]], AbstractContextManager[Execution]]


def choose_launcher(name: str, device: object, cpus: object) -> Launcher:
    """Return the launcher of that name; at the end of its context, it stops all runs that are not finished.

    device: of this machine, or several; with Ray, `cpu` or none. cpus: of each run, with Ray; None: DEFAULT_CPUS.
    Raises UserError for what cannot work.
    """
    if name == LOCAL:
        return _choose_local(device, cpus)
    if name == RAY:
        return _choose_ray(device, cpus)
    raise UserError(f"launcher={name}", "no such launcher", did_you_mean(name, (LOCAL, RAY)) or f"{LOCAL} or {RAY}")


def _choose_local(device: object, cpus: object) -> Launcher:
    if cpus is not None:
        raise UserError(f"cpus={cpus}", "is for launcher=ray", "drop it, or set the variable OMP_NUM_THREADS")
    devices = as_list(device)
    for one in devices:
        check_device(one)
    return partial(launch_locally, devices=devices)


def _choose_ray(device: object, cpus: object) -> Launcher:
    if device not in (None, "cpu"):
        problem = "is not for launcher=ray, which gives each run a GPU that is free"
        raise UserError(f"device={device}", problem, "drop it, or give device=cpu")
    given = DEFAULT_CPUS if cpus is None else cpus
    checked = validate("cpus", given, PositiveInt, "must be a whole number of at least 1", "for example cpus=4")
    if find_spec("ray") is None:
        raise UserError("launcher=ray", "Ray is not installed", "pip install 'yolokd[ray]'")
    from yolokd.commands.compare.launchers.ray_cluster import launch_on_ray
    from yolokd.commands.compare.launchers.ray_nodes import Needs

    return partial(launch_on_ray, needs=Needs(checked, gpus=0 if device == "cpu" else 1))
