"""How much the class predictions of a trained student and of its teacher disagree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.torch_utils import select_device

from yolokd.data.dataset import load_data
from yolokd.methods.features.pdf import class_disagreement
from yolokd.models.detector import Detector
from yolokd.models.teachers.outputs import RequestedOutputs
from yolokd.models.teachers.tapped_detector import detector_teacher
from yolokd.pyramid.level import resize_to
from yolokd.pyramid.pairing import ClassSelection, pair_classes
from yolokd.runtime.rng import preserve_random_state

MIN_STRIDE = 32  # as in Ultralytics' validation, which pads images to a multiple of it
LOGITS = RequestedOutputs(logits=True)


@torch.no_grad()
def mean_disagreement(
    teacher: Detector,
    student: Detector,
    settings: Mapping[str, Any],
    save_dir: Path,
    classes_map: Mapping[str, str] | None = None,
    channels: Sequence[int] | None = None,
) -> float | None:
    """Return D_pred, the mean over positions of D_hw = Σ_classes (p_T − p_S)²; the random states are left as they were.

    D_hw is that of PDF-Distil (Zhang et al., BMVC 2021), which reports its mean after training; p_T, p_S: the class
    probabilities of teacher and student. The classes are those that both models know. The mean is over all positions
    of all levels at strides that both models have, in all images of the split; each position counts once. Of
    end-to-end models the one-to-many predictions count, as in a training. Both models run in float32.

    settings: Ultralytics' for validation (data, imgsz, batch, device, split, …). classes_map: as in `pair_classes`.
    channels: of the images that the teacher sees, as in `Teacher.for_images`.
    Returns None if the models share no class or no stride, or if the teacher scores no classes at positions.
    """
    classes = pair_classes(teacher.names, student.names, classes_map)
    frozen = detector_teacher(student, "student")
    pair = detector_teacher(teacher).for_images(frozen.channels, channels), frozen
    strides = pair[0].pyramid.keys() & pair[1].pyramid.keys()
    if classes.objectness or not strides or not all(model.has_logits for model in pair):
        return None
    args = {"rect": True, **settings, "mode": "val", "task": "detect", "plots": False}
    validator = DetectionValidator(save_dir=save_dir, args=args)
    validator.data = load_data(settings["data"], split=validator.args.split)
    validator.device = device = select_device(validator.args.device, verbose=False)
    validator.stride = max(int(student.stride.max()), MIN_STRIDE)
    if device.type == "cpu":
        validator.args.workers = 0  # as in Ultralytics' validation
    selections = [ClassSelection(indices).to(device) for indices in (classes.teacher, classes.student)]
    models = [model.to(device) for model in pair]
    total, positions = 0.0, 0
    with preserve_random_state():
        for batch in validator.get_dataloader(validator.data[validator.args.split], validator.args.batch):
            images = validator.preprocess(batch)["img"]
            outputs = [model(images, LOGITS).logits for model in models]
            for stride in strides:
                t, s = (select(logits[stride]) for select, logits in zip(selections, outputs, strict=True))
                disagreement = class_disagreement(resize_to(s, t), s, "l2")
                total += float(disagreement.double().sum())
                positions += disagreement.numel()
    return total / positions
