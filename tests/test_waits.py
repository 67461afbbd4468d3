"""How often a step lets the host wait for the device: a teacher must not add to it, since the GPU would run dry."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from helpers.models import YOLOV8N, YOLOV8S, random_detector, save_checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from yolokd import YoloDistiller
from yolokd.methods import registered

# What makes the host wait for a GPU: a value is read, a shape depends on values, or host memory is copied.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "repeat_interleave", "lift_fresh")


class WaitCounter(TorchDispatchMode):
    """Counts the operations for which the host would wait, if the tensors were on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS and not (kwargs or {}).get("output_size"):
            self.counts[name] += 1
        return func(*args, **kwargs or {})


def waits_of_the_last_step(distiller: YoloDistiller, **settings: Any) -> Counter[str]:
    """Train an epoch of several steps; return the operations of the last one, in which no gradient is measured."""
    counters: list[WaitCounter] = []

    def begin(_trainer: Any) -> None:
        counters.append(WaitCounter())
        counters[-1].__enter__()

    distiller.add_callback("on_train_batch_start", begin)
    distiller.add_callback("on_train_batch_end", lambda _trainer: counters[-1].__exit__(None, None, None))
    distiller.train(**settings)
    return counters[-1].counts


def test_a_step_with_a_teacher_waits_for_the_device_as_often_as_one_without(
    tiny: dict[str, Any], tmp_path: Path
) -> None:
    """All methods at once; classes in another order and another image size add what pairing needs for these."""
    # SGD, because Adam reads a counter of each parameter, which a GPU run keeps on the CPU.
    settings = tiny | {"epochs": 1, "val": False, "optimizer": "SGD"}
    plain = waits_of_the_last_step(YoloDistiller(student=YOLOV8N, method="none"), **settings)
    assert plain["_local_scalar_dense"] > 0
    other = random_detector(YOLOV8S, {0: "box", 1: "cat", 2: "disc"})
    teachers = [str(save_checkpoint(other, tmp_path / f"{name}.pt")) for name in ("weak", "strong")]
    methods = {name for name, method in registered().items() if method.__module__.startswith("yolokd.")}
    keys = {"pdf.box": 1, "level_weights": "confidence"}
    distilled = YoloDistiller(teacher=teachers, student=YOLOV8N, method="+".join(sorted(methods - {"ld"})), **keys)
    more = {"teacher_precision": "fp32", "stages": 0.3, "probe": 100}
    assert waits_of_the_last_step(distilled, **settings | more | {"teacher_imgsz": 96}) == plain
    # LD refuses another image size.
    within = YoloDistiller(teacher=teachers, student=YOLOV8N, method="ld+crosskd", **{"crosskd.depth": 1})
    assert waits_of_the_last_step(within, **settings | more) == plain
