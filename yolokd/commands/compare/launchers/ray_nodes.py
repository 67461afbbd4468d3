"""The nodes of a Ray cluster: which of them can execute a comparison's runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from tempfile import NamedTemporaryFile
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from yolokd.commands.compare.identity import ComparisonRun
from yolokd.commands.compare.launchers.ray_task import missing_files
from yolokd.errors import UserError
from yolokd.models.teachers.backbone import is_backbone, split_backbone
from yolokd.runtime.console import CONSOLE

CHECK_SECONDS = 120.0  # ours: how long a node may take to start Python and to import yolokd
FILE_KEYS = ("teacher", "student", "data", "pretrained", "unlabelled")  # keys that may name files


@dataclass(frozen=True)
class Needs:
    """The CPUs and GPUs that a run takes of its node."""

    cpus: int
    gpus: int

    @property
    def options(self) -> dict[str, int]:
        """Return the options of a Ray task."""
        return {"num_cpus": self.cpus, "num_gpus": self.gpus}

    @property
    def device(self) -> str:
        """Return the device to train on; Ray shows a run its own GPU only, which is then the first that torch sees."""
        return "0" if self.gpus else "cpu"

    def fit(self, node: Mapping[str, Any]) -> int:
        """Return how many runs a node, as `ray.nodes` returns it, can execute at the same time."""
        resources = node["Resources"] if node["Alive"] else {}
        needed = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        return min(int(resources.get(name, 0) // count) for name, count in needed.items())

    def __str__(self) -> str:
        return f"cpus={self.cpus}" + (" and a GPU" if self.gpus else "")


def _nodes() -> list[dict[str, Any]]:
    return list(ray.nodes())  # type: ignore[no-untyped-call]


def capacity(needs: Needs) -> int:
    """Return how many runs the cluster's nodes can execute at the same time."""
    return sum(needs.fit(node) for node in _nodes())


def check_nodes(runs: Sequence[ComparisonRun], needs: Needs) -> None:
    """Print how many runs the cluster can execute at the same time.

    Raises UserError if it can execute none, and if a node that could execute one lacks files or yolokd.
    """
    if not capacity(needs):
        more_cpus = " or a smaller cpus=" if needs.cpus > 1 else ""
        cure = f"add such a node, or give device=cpu{more_cpus}" if needs.gpus else f"add such a node{more_cpus}"
        raise UserError("launcher=ray", f"no node of the cluster has {needs} for a run", cure)
    nodes = [node for node in _nodes() if needs.fit(node)]
    project = runs[0].project
    project.mkdir(parents=True, exist_ok=True)
    files = {file for run in runs for key in FILE_KEYS for file in _existing_files(run.keys.get(key))}
    with NamedTemporaryFile(dir=project, prefix=".ray-") as marker:  # a folder of that name may not be the same one
        check_files([marker.name, *files], nodes)
    alive = sum(node["Alive"] for node in _nodes())
    CONSOLE.print(f"Ray: {len(nodes)} of {alive} nodes can execute runs, up to {capacity(needs)} at the same time")


def _existing_files(value: object) -> list[str]:
    """Return the absolute paths in a key's value; Ultralytics finds some models by names that are no files.

    >>> _existing_files(["yolov8l.pt", __file__, f"timm:resnet18@{__file__}"]) == [__file__, __file__]
    True
    """
    values = value if isinstance(value, list | tuple) else [value]
    values = [split_backbone(str(each))[1] if is_backbone(each) else each for each in values]
    return [file for file in values if isinstance(file, str) and os.path.isabs(file) and os.path.exists(file)]


def check_files(files: Sequence[str], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError if a node does not see one of the files, or cannot import yolokd."""
    check = ray.remote(missing_files)
    names = {}
    for node in nodes:
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        task = check.options(num_cpus=0, scheduling_strategy=here).remote(files)
        names[task] = node["NodeManagerHostname"]
    for task in ray.wait(list(names), num_returns=len(names), timeout=CHECK_SECONDS)[0]:
        try:
            missing = ray.get(task)
        except RayTaskError as e:
            problem = f"node {names[task]} cannot import yolokd: {str(e).strip().splitlines()[-1]}"
            raise UserError("launcher=ray", problem, "install the same yolokd on all nodes") from e
        except RayError:  # the node is lost; the others will do
            continue
        if missing:
            problem = f"node {names[task]} does not see {missing[0]}"
            raise UserError("launcher=ray", problem, "put project=, data= and models where all nodes see them")
