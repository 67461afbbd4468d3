"""The names inside a sidecar: a training resumes from sidecars that earlier versions wrote."""

from __future__ import annotations

from typing import Any

import torch
from helpers.runs import train_one_epoch

from yolokd.training.sidecar import sidecars

# As yolokd 0.1.0 wrote them. The names of the criterion are those of attributes and buffers. If you rename one, raise
# the format in yolokd/training/sidecar.py, read older sidecars, too, and test that with one of them.
FORMAT = 1
KEYS = {
    "format", "yolokd", "epoch", "device", "names", "own", "model", "gradients", "pending", "ema", "optimizer",
    "scaler", "stopper", "stop", "best_fitness", "fitness", "metrics", "csv", "streams", "teachers", "precisions",
    "criterion", "measured",
    "content", "threads",  # added later; a resume works without them
}  # fmt: skip
STREAMS = {"random", "sampler", "buffer", "images"}
RANDOM = {"python", "numpy", "torch", "cuda"}
CRITERION = {
    "stages.0.share",
    "stages.0.balance.task", "stages.0.balance.pull", "stages.0.balance.seen",
    "stages.0.methods.0.0.adapt.weight", "stages.0.methods.0.0.adapt.bias",
    "stages.0.methods.0.0.transform.0.weight", "stages.0.methods.0.0.transform.0.bias",
    "stages.0.methods.0.0.transform.2.weight", "stages.0.methods.0.0.transform.2.bias",
    "stages.0.methods.0.1.adapt.weight", "stages.0.methods.0.1.adapt.bias",
    "stages.0.methods.0.1.transform.0.weight", "stages.0.methods.0.1.transform.0.bias",
    "stages.0.methods.0.1.transform.2.weight", "stages.0.methods.0.1.transform.2.bias",
    "stages.0.methods.0.2.adapt.weight", "stages.0.methods.0.2.adapt.bias",
    "stages.0.methods.0.2.transform.0.weight", "stages.0.methods.0.2.transform.0.bias",
    "stages.0.methods.0.2.transform.2.weight", "stages.0.methods.0.2.transform.2.bias",
    "stages.0.methods.1.0.adapt.weight", "stages.0.methods.1.0.adapt.bias",
    "stages.0.methods.1.1.adapt.weight", "stages.0.methods.1.1.adapt.bias",
    "stages.0.methods.1.2.adapt.weight", "stages.0.methods.1.2.adapt.bias",
}  # fmt: skip
YOLOKD_KEYS = {
    "teacher", "stages", "method", "balance", "level_weights", "check_teacher", "teacher_precision", "teacher_imgsz",
    "teacher_compile", "probe", "trust", "force", "dfd.schedule", "dfd.warmup", "dfd.end", "dfd.alpha", "dfd.beta",
    "dfd.regions", "dfd.constraint", "dfd.width", "pdf.schedule", "pdf.warmup", "pdf.end", "pdf.distance",
    "pdf.weighting", "pdf.box",
}  # fmt: skip
MEASURED = {
    f"{level}/{value}"
    for level in ("P3", "P4", "P5")
    for value in ("share", "task_grad", "dfd_grad", "pdf_grad", "dfd_ratio", "pdf_ratio", "dfd_gain", "pdf_gain")
}


def test_a_sidecar_holds_the_names_that_earlier_versions_wrote(tiny: dict[str, Any], teacher: str) -> None:
    folder = train_one_epoch(tiny, teacher, method="dfd+pdf")
    (file,) = sidecars(folder / "weights" / "last.pt")
    state = torch.load(file, weights_only=True)
    assert state["format"] == FORMAT
    assert state.keys() == KEYS
    assert state["criterion"].keys() == CRITERION
    assert state["own"].keys() == YOLOKD_KEYS
    assert state["measured"].keys() == MEASURED
    assert state["ema"].keys() == {"state", "updates"}
    assert state["stopper"].keys() == {"best_fitness", "best_epoch", "patience", "possible_stop"}
    assert [streams.keys() for streams in state["streams"]] == [STREAMS]
    assert state["streams"][0]["random"].keys() == RANDOM
