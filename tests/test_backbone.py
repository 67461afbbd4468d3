"""Teachers from timm: their maps, at which levels they teach, what is refused, what a run says of them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.models import YOLO26S, YOLOV8N, random_detector, save_checkpoint
from helpers.results import repeatable_rows, rows
from helpers.runs import TINY, train_and_stop
from torch import Tensor

from yolokd import UserError, YoloDistiller
from yolokd.commands.check import print_check
from yolokd.commands.compare.identity import read_shared_content
from yolokd.commands.compare.plan import plan_runs
from yolokd.models.checkpoint import load_model
from yolokd.models.teachers import backbone as backbone_module
from yolokd.models.teachers.backbone import Backbone, backbone_teacher, load_backbone
from yolokd.models.teachers.teacher import InferenceSettings, Teacher
from yolokd.training.plan import make_plan
from yolokd.training.settings import training_keys, with_absolute_paths

DINO, CONVNEXT = "vit_small_patch16_dinov3", "convnext_atto"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return `teacher=` of backbones with random weights, by timm's name; the second's are of whole classifiers."""
    folder, sources = tmp_path_factory.mktemp("weights"), {}
    for name, ending in ((DINO, "safetensors"), (CONVNEXT, "pth")):
        torch.manual_seed(0)
        model, path = timm.create_model(name), folder / f"{name}.{ending}"
        if ending == "pth":
            torch.save(model.state_dict(), path)
        else:
            from safetensors.torch import save_file

            save_file(model.state_dict(), path)
        sources[name] = f"timm:{name}@{path}"
    return sources


@pytest.fixture(scope="module")
def dino(sources: dict[str, str]) -> Backbone:
    return load_backbone(sources[DINO])


@pytest.fixture(scope="module")
def convnext(sources: dict[str, str]) -> Backbone:
    return load_backbone(sources[CONVNEXT])


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def normalized(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images - mean[:, None, None]) / std[:, None, None]


@torch.no_grad()
def test_a_vision_transformers_patch_grid_is_its_normalized_output_at_the_chosen_levels(
    dino: Backbone, sources: dict[str, str], images: Tensor
) -> None:
    model = timm.create_model(DINO, checkpoint_path=sources[DINO].partition("@")[2]).eval()
    tokens = model.forward_features(normalized(images))[:, model.num_prefix_tokens :]
    expected = tokens.transpose(1, 2).reshape(2, 384, 4, 6)
    teacher = backbone_teacher(dino, [8, 16, 32])
    assert teacher.pyramid == {16: 384}
    torch.testing.assert_close(teacher(images).maps[16], expected, rtol=1e-3, atol=1e-4)
    both = backbone_teacher(dino, [8, 16, 32], [8, 16])(images).maps
    assert both.keys() == {8, 16}
    assert both[8] is both[16]  # the comparison with the student's map resamples it


@torch.no_grad()
def test_a_pyramid_gives_timms_feature_maps(convnext: Backbone, sources: dict[str, str], images: Tensor) -> None:
    path = sources[CONVNEXT].partition("@")[2]
    model = timm.create_model(CONVNEXT, features_only=True, pretrained=True, pretrained_cfg_overlay={"file": path})
    expected, teacher = model.eval()(normalized(images)), backbone_teacher(convnext, [8, 16, 32])
    assert teacher.pyramid == {4: 40, 8: 80, 16: 160, 32: 320}
    for actual, m in zip(teacher(images).maps.values(), expected, strict=True):
        torch.testing.assert_close(actual, m, rtol=1e-4, atol=1e-4)


# Small ones of their kind: a Swin gives maps with the channels last, a Hiera takes images of one size alone.
SMALL = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)},
    "hiera_tiny_224": {"embed_dim": 24, "num_heads": 1, "stages": (1, 1, 1, 1)},
    "eva02_tiny_patch14_224": {"depth": 3},
}


def test_maps_of_other_layouts_strides_and_fixed_sizes_cover_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    def random_weights(_timm: Any, name: str, pretrained: bool = False, **keys: Any) -> Any:
        return create(_timm, name, **keys, **SMALL[name])

    create = backbone_module._create
    monkeypatch.setattr(backbone_module, "_create", random_weights)
    swin, hiera, patch14 = (load_backbone(f"timm:{name}") for name in SMALL)
    images = torch.rand(1, 3, 64, 96)
    assert [m.shape[1] for m in swin(images)] == [24, 48, 96, 192]
    assert hiera.size == (224, 224)
    resized = F.interpolate(images, (224, 224), mode="bilinear", antialias=True)
    for level, m in zip(hiera.strides, hiera(images), strict=True):
        assert m.shape[-2:] == (224 // level, 224 // level)
    torch.testing.assert_close(hiera(images)[0], hiera(resized)[0])
    assert patch14(torch.rand(1, 3, 70, 90))[0].shape[-2:] == (5, 7)  # of the image stretched to 70 x 98 pixels
    low = patch14.bfloat16()(images.bfloat16())[0]  # images are also resized in half precision
    assert (low.float() - patch14.float()(images)[0]).norm() < 0.05 * low.float().norm()


def test_a_backbone_is_frozen_and_copies_in_other_precisions_give_nearly_the_same_maps(
    dino: Backbone, images: Tensor
) -> None:
    teacher = backbone_teacher(dino, [16])
    assert not any(p.requires_grad for p in dino.parameters())
    assert not dino.training
    assert not teacher.has_logits
    assert teacher.names == {}
    assert isinstance(teacher, Teacher)
    maps = teacher(images).maps[16]
    assert not maps.requires_grad
    low = teacher.with_settings(InferenceSettings(torch.bfloat16))(images).maps[16].float()
    assert 0 < (low - maps).norm() < 0.05 * maps.norm()


def settings(data: str, teacher: Any, **more: Any) -> dict[str, Any]:
    own = {"teacher": teacher, "student": YOLOV8N, "method": "fitnet", "teacher_precision": "fp32"}
    return {**TINY, **own, "data": data, "epochs": 2, **more}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"method": "fitnet+bckd"}, "has no class scores and boxes per position, which bckd needs"),
        ({"method": "pdf"}, "has no class scores and boxes per position, which pdf needs"),
        ({"level_floor": 0.3}, "level_floor=0.3: has no effect: the teacher scores no classes"),
        ({"levels": 64}, "levels=[64]: teacher and student do not both have a level of stride 64"),
        ({"levels": 0}, "levels=(0,): not a valid value"),
        ({"teacher": "timm:vit_smal_patch16_dinov3"}, "timm knows no model 'vit_smal_patch16_dinov3' (did"),
        ({"teacher": f"timm:{DINO}@none.pth"}, "no such file: none.pth"),
        ({"teacher": f"timm:{DINO}@{__file__}"}, "its weights do not fit"),
    ],
)  # fmt: skip
def test_what_a_backbone_cannot_do_is_refused_by_name(
    keys: dict[str, Any], message: str, data: str, sources: dict[str, str]
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        make_plan(training_keys(settings(data, sources[CONVNEXT]) | keys))


def test_weights_under_other_names_are_refused(sources: dict[str, str], tmp_path: Path) -> None:
    weights = torch.load(sources[CONVNEXT].partition("@")[2], weights_only=True)
    torch.save({f"backbone.{name}": value for name, value in weights.items()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="its weights do not fit"):
        load_backbone(f"timm:{CONVNEXT}@{tmp_path / 'w.pth'}")


def test_weights_that_could_run_code_are_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="its weights do not fit"):
        load_backbone(f"timm:{CONVNEXT}@{tmp_path / 'weights.pth'}")
    assert not (tmp_path / "ran").exists()


def test_without_timm_the_error_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_timm(name: str) -> Any:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(backbone_module, "import_module", no_timm)
    with pytest.raises(UserError, match=re.escape("needs timm, which is not installed (pip install 'yolokd[timm]')")):
        load_backbone("timm:resnet18")


def test_weights_keep_their_absolute_path() -> None:
    keys = with_absolute_paths({"teacher": ["timm:resnet18@w.pth", "timm:resnet18"]})
    assert keys["teacher"] == [f"timm:resnet18@{Path('w.pth').absolute()}", "timm:resnet18"]


def test_weights_that_cannot_be_downloaded_are_one_line_of_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"timm cannot load it: .*give weights of your own: timm:{CONVNEXT}@weights"):
        load_backbone(f"timm:{CONVNEXT}")


@pytest.fixture(scope="module")
def run(data: str, sources: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with a patch grid and a detector in an ensemble, stop, and resume; return the run's folder."""
    folder = tmp_path_factory.mktemp("run")
    detector = save_checkpoint(random_detector(YOLO26S), folder / "detector.pt")
    keys = settings(data, [sources[DINO], str(detector)], teachers="ensemble", save_dir=str(folder / "run"))
    train_and_stop(YoloDistiller(), keys | {"check_teacher": False})
    YoloDistiller().train(resume=str(folder / "run"))
    return folder / "run"


def test_a_backbone_teaches_at_its_level_beside_a_detector(run: Path) -> None:
    assert [row["epoch"] for row in repeatable_rows(run)] == [1, 2]
    first = rows(run)[0]
    assert first["level/P4/fitnet_ratio"] > 0
    assert first["level/P3/fitnet_ratio"] > 0


def test_a_run_names_the_backbone_its_weights_and_their_hash(run: Path, dino: Backbone) -> None:
    origin = load_model(run / "weights" / "best.pt", "model")[0].yolokd["teacher"][0]
    name = f"timm:{DINO}"
    assert origin == {"file": name, "sha256": dino.sha256, "precision": "fp32", "weights": f"{DINO}.safetensors"}
    card = (run / "weights" / "MODEL_CARD.md").read_text()
    assert f"(weights: {DINO}.safetensors) | {dino.sha256} |".replace("_", r"\_") in card


def test_other_weights_are_another_teacher(dino: Backbone, tmp_path: Path) -> None:
    state = {key: value.clone() for key, value in dino.model.state_dict().items()}
    state["norm.bias"][0] += 1
    torch.save(state, tmp_path / "other.pth")
    assert load_backbone(f"timm:{DINO}@{tmp_path / 'other.pth'}").sha256 != dino.sha256


def test_check_shows_the_levels_that_a_backbone_teaches(
    data: str, sources: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_check(settings(data, sources[CONVNEXT], levels=[8, 16]))
    told = " ".join(capsys.readouterr().out.split())
    assert f"pyramid levels paired with teacher timm:{CONVNEXT}" in told
    assert "level P5 of the student has no partner" in told
    assert "the teacher is a backbone: it teaches feature maps alone" in told
    assert "boxes of a class" not in told


def test_a_comparison_knows_a_backbone_by_its_weights(
    data: str, sources: dict[str, str], convnext: Backbone, tmp_path: Path
) -> None:
    keys = {"teacher": sources[CONVNEXT], "student": YOLOV8N, "data": data, "imgsz": 64, "epochs": 1, "device": "cpu"}
    runs, _ = plan_runs(["none", "fitnet"], 0, "val", tmp_path, keys)
    assert [run.method for run in runs] == ["none", "fitnet"]  # there is no run that scores the teacher
    assert runs[1].strongest_teacher == ""
    content = read_shared_content(keys, make_plan(training_keys(settings(data, sources[CONVNEXT]))), "val")
    assert content.teachers == (convnext.sha256,)
    with pytest.raises(UserError, match="method=native: takes no timm backbone"):
        plan_runs(["native", "fitnet"], 0, "val", tmp_path, keys)
