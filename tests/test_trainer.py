"""The trainer, in short real trainings."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
import yaml
from helpers.data import write_dataset
from helpers.models import YOLO26N, YOLOV8N, YOLOV8S, calibrated_detector, label_with, random_detector, save_checkpoint
from helpers.results import rows, states_equal, weights
from helpers.runs import TINY, captured_log, distil, train_and_stop, train_plainly
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import RTDETRDetectionModel, SegmentationModel
from ultralytics.utils.torch_utils import get_num_params, model_info_for_loggers

from yolokd import UserError, YoloDistiller, distillation_trainer, register
from yolokd.commands.check import print_check
from yolokd.config.parse import split_keys
from yolokd.distillation.criterion import DistillationCriterion
from yolokd.methods import Method
from yolokd.models.checkpoint import load_model
from yolokd.models.teachers import precision
from yolokd.training.resume.sidecar import sidecar_path, sidecars

# Every time for an end-to-end head, which Ultralytics handles separately; for the simpler one among the slow tests.
SIMPLER_SLOW = (pytest.param(YOLOV8N, marks=pytest.mark.slow), YOLO26N)


@pytest.fixture(scope="module", autouse=True)
def _first_training(data: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Train once: in older Ultralytics, a process's first training draws other random numbers than later ones."""
    root = tmp_path_factory.mktemp("first")
    train_plainly(YOLOV8N, TINY, data=data, epochs=1, project=str(root))


@pytest.fixture(scope="module")
def plain_weights(data: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, torch.Tensor]]:
    """Return a function that trains a student one epoch with Ultralytics alone, once, and returns its weights."""
    keys = TINY | {"data": data, "project": str(tmp_path_factory.mktemp("plain")), "epochs": 1}
    return cache(lambda student: weights(train_plainly(student, keys)))


@pytest.mark.parametrize("student", SIMPLER_SLOW)
def test_method_none_equals_plain_training(student: str, tiny: dict[str, Any]) -> None:
    ours = YoloDistiller(student=student, method="none")
    ours.train(**tiny)
    theirs = train_plainly(student, tiny)
    assert states_equal(weights(ours.trainer), weights(theirs))
    assert states_equal(ours.trainer.ema.ema.state_dict(), theirs.ema.ema.state_dict())


def test_gradients_are_accumulated_as_in_plain_training(tiny: dict[str, Any]) -> None:
    """A step takes more images than a batch has, also in the warm-up and across the ends of epochs."""
    tiny |= {"nbs": 20, "epochs": 4, "warmup_epochs": 2.0}
    ours = YoloDistiller(student=YOLOV8N, method="none")
    ours.train(**tiny)
    assert states_equal(weights(ours.trainer), weights(train_plainly(YOLOV8N, tiny)))


@pytest.mark.parametrize("student", SIMPLER_SLOW)
def test_gains_of_zero_give_the_weights_of_plain_training(
    student: str, tiny: dict[str, Any], teacher: str, plain_weights: Callable[[str], dict[str, torch.Tensor]]
) -> None:
    keys = {"probe": 1, "dfd.gain": 0, "pdf.gain": 0}
    d = distil(teacher, student, tiny | {"check_teacher": True, "epochs": 1}, **keys)
    assert states_equal(weights(d.trainer), plain_weights(student))


def test_a_gain_above_zero_changes_the_student(
    tiny: dict[str, Any], teacher: str, plain_weights: Callable[[str], dict[str, torch.Tensor]]
) -> None:
    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1})
    assert not states_equal(weights(d.trainer), plain_weights(YOLOV8N))


def test_class_weights_work_as_in_plain_training(tiny: dict[str, Any], teacher: str) -> None:
    tiny |= {"epochs": 1}
    d = distil(teacher, YOLOV8N, tiny, cls_pw=0.7, **{"dfd.gain": 0, "pdf.gain": 0})
    assert d.trainer.criterion.base.class_weights is not None
    assert states_equal(weights(d.trainer), weights(train_plainly(YOLOV8N, tiny, cls_pw=0.7)))


def test_end_to_end_losses_change_their_mix_each_epoch(tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, YOLO26N, tiny | {"epochs": 3})
    base = d.trainer.criterion.base
    assert base.updates == 3
    assert base.o2m < 0.8


def test_the_teacher_never_changes(tiny: dict[str, Any], teacher: str) -> None:
    seen: dict[str, Any] = {}

    def remember(trainer: Any) -> None:
        seen["before"] = {k: v.clone() for k, v in trainer.plan.teachers[0].teacher.state_dict().items()}
        seen["model"] = trainer.plan.teachers[0].model
        seen["loaded"] = {k: v.clone() for k, v in seen["model"].state_dict().items()}

    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd+pdf")
    d.add_callback("on_pretrain_routine_end", remember)
    d.train(**tiny | {"check_teacher": True})
    assert states_equal(seen["before"], d.trainer.plan.teachers[0].teacher.state_dict())
    assert states_equal(seen["loaded"], seen["model"].state_dict())


def test_results_csv_holds_losses_gains_and_gradients_of_levels(tiny: dict[str, Any], teacher: str) -> None:
    fixed = {"pdf.gain": 0.5, "pdf.schedule": "constant"}
    d = distil(teacher, YOLOV8N, tiny, probe=3, **fixed)  # one measurement an epoch
    results = rows(d.trainer)
    assert len(results) == 2
    for row in results:
        assert row["train/dfd_loss"] > 0
        assert row["train/pdf_gain"] == 0.5
        for level in ("P3", "P4", "P5"):
            task, ours = (row[f"level/{level}/{k}_grad"] for k in ("task", "pdf"))
            assert task > 0
            assert ours > 0
            assert math.isclose(row[f"level/{level}/dfd_ratio"], row[f"level/{level}/dfd_grad"] / task, rel_tol=1e-3)
        assert math.isclose(sum(row[f"level/{p}/share"] for p in ("P3", "P4", "P5")), 1, rel_tol=1e-3)
        assert 0 < row["clip/student"] <= 1
        assert "val/box_loss" in row
        assert "val/dfd_loss" not in row


def test_loggers_get_the_students_size_without_adapters(tiny: dict[str, Any], teacher: str) -> None:
    sizes: list[float] = []
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="mgd")
    d.add_callback("on_fit_epoch_end", lambda t: sizes.append(model_info_for_loggers(t)["model/parameters"]))
    d.train(**tiny | {"epochs": 1, "teacher_precision": "fp32"})
    assert set(sizes) == {get_num_params(d.trainer.ema.ema)}


def test_without_validation_results_csv_keeps_its_columns(tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, YOLOV8N, tiny | {"val": False})
    assert len(rows(d.trainer)) == 2  # fails if a row has more or fewer cells than columns


def test_gradients_of_adapters_are_clipped_separately(
    tiny: dict[str, Any], teacher: str, plain_weights: Callable[[str], dict[str, torch.Tensor]]
) -> None:
    """In one norm with the student's, the huge gradient of this adapter would shrink the student's."""

    @register("loud")
    class Loud(Method):
        def __init__(self, shape: Any) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def forward(self, level: Any) -> torch.Tensor:
            return self.weight * 1e8 + 0 * level.student.sum()

    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1}, method="loud")
    assert states_equal(weights(d.trainer), plain_weights(YOLOV8N))


CHECK_PLAIN = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'yolokd':
            raise ImportError('yolokd is not installed')
sys.meta_path.insert(0, Block())
import torch
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
data, project, *paths = sys.argv[1:]
for path in paths:
    y = YOLO(path)
    assert list(y.model._modules) == ['model'], list(y.model._modules)
    assert not y.model._forward_hooks and not y.model._forward_pre_hooks
    assert isinstance(y.model.yolokd, dict) and y.model.yolokd['method'] == 'dfd+pdf', y.model.yolokd
    reference = type(y.model)(y.model.yaml, nc=2, verbose=False)
    assert reference.state_dict().keys() == y.model.state_dict().keys()
    assert [n for n, _ in reference.named_modules()] == [n for n, _ in y.model.named_modules()]
    y.model.args = get_cfg()
    batch = {'img': torch.rand(2, 3, 64, 64), 'cls': torch.zeros(2, 1), 'bboxes': torch.full((2, 4), .5),
             'batch_idx': torch.arange(2.)}
    loss, items = y.model.loss(batch)
    assert torch.isfinite(loss).all() and set(items) <= {'box_loss', 'cls_loss', 'dfl_loss', 'l1_loss'}, items
    YOLO(path).train(data=data, epochs=1, imgsz=64, batch=4, plots=False, project=project, name='again', device='cpu')
print('plain')
"""


@pytest.mark.parametrize("student", SIMPLER_SLOW)
def test_checkpoints_work_in_ultralytics_without_yolokd(
    student: str, tiny: dict[str, Any], teacher: str, tmp_path: Path
) -> None:
    d = YoloDistiller(teacher=teacher, student=student, method="dfd+pdf")
    mid_run = tmp_path / "mid-run.pt"
    d.add_callback("on_model_save", lambda t: mid_run.write_bytes(t.last.read_bytes()))
    d.train(**tiny | {"epochs": 1})
    paths = [str(path) for path in (d.trainer.best, d.trainer.last, mid_run)]
    command = [sys.executable, "-c", CHECK_PLAIN, tiny["data"], str(tmp_path), *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.endswith("plain\n"), done.stderr


def test_checkpoints_hold_their_provenance(tiny: dict[str, Any], teacher: str) -> None:
    import hashlib

    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1}, teacher_precision="bf16", **{"pdf.gain": 2})
    origin = YOLO(d.trainer.best).model.yolokd
    sha256 = hashlib.sha256(Path(teacher).read_bytes()).hexdigest()
    assert origin["teacher"] == {"file": "teacher.pt", "sha256": sha256, "precision": "bf16"}
    assert origin["gains"]["pdf"] == 2
    assert {"yolokd", "ultralytics", "torch"} <= origin["versions"].keys()


@pytest.mark.parametrize("student", SIMPLER_SLOW)
def test_a_resume_restores_adapters_and_finishes_the_run(student: str, tiny: dict[str, Any], teacher: str) -> None:
    tiny = tiny | {"epochs": 3}
    d = YoloDistiller(teacher=teacher, student=student, method="dfd+pdf", **{"dfd.gain": 2})
    train_and_stop(d, tiny, epoch=1)
    saved = d.trainer.criterion.private_state()
    folder = d.trainer.save_dir
    assert sidecars(d.trainer.last)

    again = YoloDistiller()
    restored: dict[str, Any] = {}
    again.add_callback("on_train_start", lambda t: restored.update(deepcopy(t.criterion.private_state())))
    named = {"resume": str(folder)} if student == YOLOV8N else {"resume": True, "project": tiny["project"]}
    again.train(**named)
    assert states_equal(saved, restored)
    assert again.trainer.start_epoch == 2
    assert again.trainer.plan.config.method_configs[0].gain == 2
    assert isinstance(again.trainer.criterion, DistillationCriterion)
    assert [r["epoch"] for r in rows(again.trainer)] == [1, 2, 3]
    assert again.trainer.save_dir == folder
    assert not sidecars(again.trainer.last)
    if student == YOLO26N:
        assert again.trainer.criterion.base.updates == 3

    with pytest.raises(UserError, match="finished"):
        YoloDistiller().train(resume=str(folder))


def test_a_resume_with_another_method_is_refused(tiny: dict[str, Any], teacher: str) -> None:
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd")

    train_and_stop(d, tiny)
    with pytest.raises(UserError, match="method: cannot change"):
        YoloDistiller(method="pdf").train(resume=str(d.trainer.save_dir))
    with pytest.raises(UserError, match="unlabelled: cannot change"):
        YoloDistiller().train(resume=str(d.trainer.save_dir), unlabelled=str(Path(tiny["data"]).parent))


@pytest.mark.parametrize("student", SIMPLER_SLOW)
def test_nan_recovery_restores_student_and_adapters(student: str, tiny: dict[str, Any], teacher: str) -> None:
    d = YoloDistiller(teacher=teacher, student=student, method="dfd+pdf")
    seen: dict[str, Any] = {"recovered": 0}

    class Event:
        """Stands for the events of a GPU that the criterion keeps: like these, it cannot be copied."""

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("cannot pickle 'Event' object")

    def poison(trainer: Any) -> None:
        if trainer.epoch == 1 and not seen.get("poisoned"):
            seen["poisoned"] = True
            vars(trainer.criterion)["event"] = Event()
            with torch.no_grad():
                next(trainer.model.model.parameters()).fill_(math.nan)

    def look(trainer: Any) -> None:
        if seen.get("poisoned") and not seen["recovered"]:
            seen["recovered"] = trainer.nan_recovery_attempts
            seen["finite"] = all(torch.isfinite(p).all() for p in trainer.model.parameters())
            seen["restored"] = {k: v.clone() for k, v in trainer.criterion.private_state().items()}

    def remember(trainer: Any) -> None:
        if trainer.epoch == 0:
            seen["saved"] = {k: v.clone() for k, v in trainer.criterion.private_state().items()}

    d.add_callback("on_model_save", remember)
    d.add_callback("on_train_epoch_start", look)
    d.add_callback("on_train_batch_start", poison)
    d.train(**tiny | {"epochs": 3})
    assert seen["recovered"] == 1
    assert seen["finite"]
    assert states_equal(seen["saved"], seen["restored"])
    assert list(d.trainer.ema.ema._modules) == ["model"]
    assert len(rows(d.trainer)) == 3


def test_distill_yaml_repeats_the_run(tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1}, **{"dfd.alpha": 0.5})
    cfg = yaml.safe_load((d.trainer.save_dir / "distill.yaml").read_text())
    assert cfg["dfd.alpha"] == 0.5
    assert cfg["method"] == "dfd+pdf"
    again = YoloDistiller()
    again.train(**cfg)
    assert again.trainer.save_dir != d.trainer.save_dir
    assert states_equal(weights(again.trainer), weights(d.trainer))


def test_the_trainer_for_yolo_train_gives_the_same_weights_as_the_distiller(tiny: dict[str, Any], teacher: str) -> None:
    tiny |= {"epochs": 1}
    ours = distil(teacher, YOLOV8N, tiny, method="dfd")
    keys = split_keys(tiny)
    trainer = distillation_trainer(teacher=teacher, method="dfd", teacher_precision="fp32", **keys.distillation)
    model = YOLO(YOLOV8N)
    model.train(**keys.ultralytics, trainer=trainer)
    assert states_equal(weights(ours.trainer), weights(model.trainer))


def test_teacher_and_student_may_be_model_objects(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    save_checkpoint(random_detector(YOLOV8S, seed=1), tmp_path / "t.pt")
    student = random_detector(seed=5)
    d = YoloDistiller(teacher=YOLO(tmp_path / "t.pt"), student=student, method="pdf")
    metrics = d.train(**tiny | {"epochs": 1})
    assert metrics.box.map >= 0
    assert Path(d.trainer.args.teacher).is_file()


def test_a_registered_method_trains_and_its_constants_are_checked(tiny: dict[str, Any], teacher: str) -> None:
    @register("half")
    class Half(Method):
        def __init__(self, shape: Any, *, power: float = 2.0) -> None:
            super().__init__()
            self.adapt = nn.Conv2d(shape.student_channels, shape.teacher_channels, 1)
            self.power = power

        def forward(self, level: Any) -> torch.Tensor:
            return (self.adapt(level.student) - level.teacher).abs().pow(self.power).mean()

    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1}, method="half+dfd", **{"half.power": 1.5})
    assert rows(d.trainer)[-1]["train/half_loss"] > 0
    with pytest.raises(UserError, match=r"half\.power"):
        distil(teacher, YOLOV8N, tiny, method="half", **{"half.power": "much"})


def test_a_teacher_without_a_shared_class_teaches_objectness(tiny: dict[str, Any], tmp_path: Path) -> None:
    other = save_checkpoint(random_detector(YOLOV8S, {0: "cat", 1: "dog", 2: "cow"}), tmp_path / "other.pt")
    with captured_log() as lines:
        d = distil(str(other), YOLOV8N, tiny | {"check_teacher": True, "epochs": 1}, method="pdf")
    assert any("knows none of the data set's classes (disc, box)" in line for line in lines)
    assert any("one objectness" in line for line in lines)
    assert d.trainer.plan.teachers[0].pairing.classes.objectness
    assert rows(d.trainer)[0]["train/pdf_loss"] > 0


def test_a_teacher_with_a_low_score_gives_a_warning(tiny: dict[str, Any], tmp_path: Path) -> None:
    path = save_checkpoint(random_detector(YOLOV8S, {0: "disc", 1: "cow"}), tmp_path / "half.pt")
    with captured_log() as lines:
        d = distil(str(path), YOLOV8N, tiny | {"check_teacher": True, "epochs": 1}, method="pdf")
    assert d.trainer.teacher_score < 0.05
    assert any("useless on this validation set" in line for line in lines)
    assert any("does not know box" in line for line in lines)
    assert any("Gradients as multiples of the YOLO loss's: pdf P3 " in line for line in lines)
    assert any(line.startswith("distillation: the teacher ") for line in lines)
    summary = next(line for line in lines if "result on the validation set" in line)
    teacher, before, after = (
        line for line in summary.splitlines() if "teacher half.pt" in line or "student " in line[:12]
    )
    assert f"{d.trainer.teacher_score:.3f}" in teacher
    assert f"{get_num_params(load_model(path, 'teacher')[0]) / 1e6:.2f} million" in teacher
    assert f"student after epoch 1 │ {rows(d.trainer)[0]['metrics/mAP50-95(B)']:.3f}" in before
    assert "student best.pt" in after
    assert f"{get_num_params(d.model.model) / 1e6:.2f} million" in after
    assert f"{d.trainer.best.stat().st_size / 1e6:.1f} MB" in after


def test_the_distiller_validates_predicts_and_exports(tiny: dict[str, Any], teacher: str) -> None:
    untrained = YoloDistiller(teacher=teacher)
    with pytest.raises(UserError, match="nothing is trained"):
        untrained.export()
    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1}, method="dfd")
    assert d.val(data=tiny["data"], imgsz=64, plots=False, device="cpu", project=tiny["project"]).box.map >= 0
    image = next((Path(tiny["data"]).parent / "images" / "val").glob("*.jpg"))
    assert len(d.predict(image, imgsz=64, device="cpu", project=tiny["project"])) == 1
    path = d.export(imgsz=64)
    assert path == d.trainer.best.with_suffix(".onnx")
    assert path.with_suffix(".parity.json").is_file()


def test_a_teachers_score_does_not_depend_on_the_order_of_its_classes(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A teacher with more classes in another order scores the same as the teacher that has the data set's classes."""
    data = write_dataset(tmp_path / "d", val=12)
    images = [cv2.imread(str(p)) for p in (data.parent / "images" / "val").glob("*.jpg")]
    size = 192  # most boxes lie inside images of this size: labels are clipped to the image, predictions are not
    known = calibrated_detector(YOLOV8S, images, size)
    label_with(known, data, size, tmp_path / "known.pt")
    permuted = deepcopy(known)
    permuted.names = {0: "cat", 1: "box", 2: "disc"}
    head = permuted.model[-1]
    head.nc, head.no = 3, head.no + 1
    for i, branch in enumerate(head.cv3):
        old = known.model[-1].cv3[i][-1]
        new = nn.Conv2d(old.in_channels, 3, 1)
        with torch.no_grad():
            new.weight.copy_(torch.stack([old.weight[0] * 0, old.weight[1], old.weight[0]]))
            new.bias.copy_(torch.stack([old.bias[0] * 0 - 9, old.bias[1], old.bias[0]]))
        branch[-1] = new
    scores = []
    for name, model in (("known", known), ("permuted", permuted)):
        path = save_checkpoint(model.half(), tmp_path / f"{name}.pt")
        d = YoloDistiller(teacher=str(path), student=YOLOV8N, method="pdf")
        d.train(**tiny | {"data": str(data), "imgsz": size, "epochs": 1, "check_teacher": True})
        scores.append(d.trainer.teacher_score)
    first, second = scores
    assert first > 0.1
    assert second == pytest.approx(first, abs=1e-3)


def test_an_rtdetr_teaches_methods_that_need_no_class_scores(tiny: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = RTDETRDetectionModel("rtdetr-l.yaml", nc=3, verbose=False)
    model.names = {0: "cat", 1: "box", 2: "disc"}
    path = save_checkpoint(model, tmp_path / "rtdetr.pt")
    d = distil(str(path), YOLOV8N, tiny | {"epochs": 1, "check_teacher": True}, method="dfd")
    assert d.trainer.teacher_score is not None
    assert rows(d.trainer)[0]["train/dfd_loss"] > 0
    with pytest.raises(UserError, match="no class scores and boxes per position, which ld needs"):
        distil(str(path), YOLOV8N, tiny, method="fitnet+ld")


def test_levels_that_only_the_student_has_are_left_out(tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, "yolov8n-p2.yaml", tiny | {"epochs": 1})
    row = rows(d.trainer)[0]
    assert "level/P3/dfd_ratio" in row
    assert not any("P2" in key for key in row)


def test_a_teacher_with_a_coarser_stride_gets_padded_images(tiny: dict[str, Any], tmp_path: Path) -> None:
    """A P6 teacher needs multiples of 64 pixels; the student trains at 96."""
    path = save_checkpoint(random_detector("yolov8n-p6.yaml", seed=2), tmp_path / "p6.pt")
    d = distil(str(path), YOLOV8N, tiny | {"epochs": 1, "imgsz": 96, "device": "cpu"})
    assert rows(d.trainer)[0]["train/pdf_loss"] > 0
    print_check({"teacher": str(path), "data": tiny["data"], "imgsz": 96, "device": "cpu"})


def test_a_segmentation_model_teaches_a_detector_and_its_boxes_are_scored(tiny: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SegmentationModel("yolov8n-seg.yaml", nc=2, verbose=False)
    model.names = {0: "disc", 1: "box"}
    path = save_checkpoint(model, tmp_path / "seg.pt")
    d = distil(Path(path), YOLOV8N, tiny | {"epochs": 1, "check_teacher": True})
    assert d.trainer.teacher_score == 0  # random
    assert rows(d.trainer)[0]["train/pdf_loss"] > 0


@pytest.mark.parametrize(
    "settings", [{"freeze": 16, "multi_scale": 0.5}, {"rect": True, "save_period": 1, "fraction": 0.5},
                 {"single_cls": True, "cls": 0.3, "imgsz": [64, 32], "label_smoothing": 0.0}]
)  # fmt: skip
def test_settings_of_ultralytics_work(settings: dict[str, Any], tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1} | settings)
    row = rows(d.trainer)[0]
    assert row["train/dfd_loss"] > 0
    if "freeze" in settings:  # the map at P3 is that of layer 15
        taught = [level.stride for level in d.trainer.plan.teachers[0].pairing.levels]
        assert taught == [16, 32]
        assert row["level/P4/dfd_grad"] > 0


def test_a_student_whose_maps_are_all_frozen_is_refused(tiny: dict[str, Any], teacher: str) -> None:
    with pytest.raises(UserError, match="freeze: leaves no feature map that a teacher could change"):
        distil(teacher, YOLOV8N, tiny | {"freeze": 22})
    assert not Path(tiny["project"]).exists()


def test_the_distiller_reads_settings_from_a_file(tiny: dict[str, Any], teacher: str, tmp_path: Path) -> None:
    cfg = tmp_path / "run.yaml"
    keys = {"teacher": teacher, "method": "pdf", "epochs": 1, "pdf.gain": 0.25, "pdf.schedule": "constant"}
    cfg.write_text(yaml.safe_dump(tiny | keys))
    d = YoloDistiller()
    d.train(cfg=str(cfg))
    assert rows(d.trainer)[0]["train/pdf_gain"] == 0.25


def test_bfloat16_training_works_on_cpus(tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1, "amp": "bf16"})
    losses = [v for k, v in rows(d.trainer)[0].items() if k.startswith("train/") and k.endswith("_loss")]
    assert all(math.isfinite(v) and v > 0 for v in losses)
    assert all(v.dtype == torch.float32 for v in weights(d.trainer).values() if v.is_floating_point())


def test_channels_last_training_works_on_cpus(tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, YOLOV8N, tiny | {"epochs": 1, "channels_last": True})
    convolutions = [p for p in d.trainer.model.model.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in convolutions)
    saved = torch.load(d.trainer.last, weights_only=False)["model"]
    assert all(p.is_contiguous() for p in saved.parameters())
    assert rows(d.trainer)[0]["train/dfd_loss"] > 0


@pytest.mark.parametrize(
    "keys",
    [
        {"teacher_imgsz": 96},
        {"teacher_precision": "bf16"},
        {"method": "sl2"},
        {"method": "pdf", "pdf.box": 1.0},
        {"method": "bckd"},  # has no adapter
        {"method": "ld", "student": YOLOV8N},
        {"method": "crosskd", "crosskd.depth": 1},
        {"method": "crosskd+ld", "crosskd.box": "kl", "student": YOLOV8N, "amp": "bf16", "teacher_precision": "bf16"},
    ],
    ids=str,
)
def test_settings_of_the_teacher_reach_it(keys: dict[str, Any], tiny: dict[str, Any], teacher: str) -> None:
    d = distil(teacher, **{"student": YOLO26N, "settings": tiny | {"epochs": 1}} | keys)
    losses = ("bckd_loss", "crosskd_loss", "dfd_loss", "ld_loss", "pdf_loss", "sl2_loss")
    assert all(v > 0 for k, v in rows(d.trainer)[0].items() if k.endswith(losses))
    in_force = d.trainer.criterion.stage.teacher.settings
    assert in_force.imgsz == keys.get("teacher_imgsz")
    assert "teacher_precision" not in keys or in_force.dtype == torch.bfloat16


def test_a_resumed_run_keeps_the_precision_that_auto_chose(tiny: dict[str, Any], teacher: str) -> None:
    d = YoloDistiller(teacher=teacher, student=YOLOV8N, method="dfd", teacher_precision="auto")
    train_and_stop(d, tiny)
    sidecar = sidecar_path(d.trainer.last, 0)
    state = torch.load(sidecar, weights_only=True)
    assert state["precisions"][0] in {"fp32", "bf16"}
    other = {"fp32": "bf16", "bf16": "fp32"}[state["precisions"][0]]  # stands for the choice of another machine
    torch.save(state | {"precisions": [other]}, sidecar)
    resumed = YoloDistiller()
    resumed.train(resume=str(d.trainer.save_dir))
    assert resumed.trainer.criterion.stage.teacher.settings.dtype == precision.DTYPES[other]
