"""The losses of all methods, on random and awkward maps: slow references, gradients and properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import reference
from helpers.data import two_images
from helpers.models import YOLO26N, attach_criterion, random_detector
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from ultralytics.cfg import get_cfg

from yolokd import UserError
from yolokd.config.defaults import method_defaults
from yolokd.config.parse import parse
from yolokd.config.schema import METHOD_SETTINGS
from yolokd.distillation.per_level import build_methods
from yolokd.methods import Method, register, registered
from yolokd.methods.blocks import Adapter, spatial_attention, standardized
from yolokd.methods.features.dfd import high_disparity
from yolokd.methods.features.pdf import box_disagreement, class_disagreement, position_weights
from yolokd.pyramid.boxes import Labels, decode_distances, iou
from yolokd.pyramid.head import Head, HeadShape
from yolokd.pyramid.level import Level, LevelShape
from yolokd.pyramid.squared_error import squared_error

CS, CT, K, BINS = 3, 5, 2, 4
NAMES = ["bckd", "crosskd", "cwd", "dfd", "dfmsd", "fgd", "fitnet", "frs", "ld", "mgd", "pdf", "pkd", "sl2"]
HARD = ["most25", "most50", "least25", "least50"]


def branch(channels: int) -> nn.Sequential:
    """Return the layers of a head that predicts `channels` values from a map of the teacher."""
    first = nn.Sequential(nn.Conv2d(CT, 4, 3, padding=1), nn.SiLU(inplace=True))
    return nn.Sequential(first, nn.Sequential(nn.Conv2d(4, 6, 1), nn.SiLU()), nn.Conv2d(6, channels, 1))


torch.manual_seed(0)
HEAD = Head(branch(4 * BINS).double().requires_grad_(False), branch(K).double().requires_grad_(False), BINS)


STUDENT_HEAD = HeadShape(BINS, (CS, 7, 2), (CS, 3, 5))  # the channels that enter its layers
SHAPE = LevelShape(8, CS, CT, student_head=STUDENT_HEAD, teacher_head=HEAD.shape)


def build(name: str, **constants: Any) -> Method:
    values = {k: v for k, v in method_defaults(name).items() if k not in METHOD_SETTINGS} | constants
    torch.manual_seed(0)
    return registered()[name](SHAPE, **values).double()


def random_level(b: int, h: int, w: int, seed: int = 0) -> Level:
    g = torch.Generator().manual_seed(seed)

    def draw(c: int, scale: float = 1.0) -> Tensor:
        return torch.randn(b, c, h, w, generator=g, dtype=torch.float64) * scale

    image = torch.arange(2 * b, dtype=torch.long) // 2  # two boxes an image
    low, size = torch.rand(2, 2 * b, 2, generator=g)
    labels = Labels(image, torch.cat([low, (low + 0.7 * size).clamp(max=1)], 1))
    logits, boxes = [draw(K, 3) for _ in range(3)], [draw(4).abs() for _ in range(2)]
    level = Level(8, draw(CS), draw(CT), *logits, *boxes, labels, seed)
    level.student_box_logits, level.teacher_box_logits = (draw(4 * BINS, 3).view(b, 4, BINS, h, w) for _ in range(2))
    level.assigned, level.teacher_head = torch.rand(b, h, w, generator=g) < 0.3, HEAD
    channels = zip(STUDENT_HEAD.box_channels, STUDENT_HEAD.class_channels, strict=True)
    level.head_maps = {depth: (draw(box), draw(classes)) for depth, (box, classes) in enumerate(channels)}
    return level


def tensors(level: Level) -> list[Tensor]:
    return [v for f in fields(level) if isinstance(v := getattr(level, f.name), Tensor)]


def like(level: Level, change: Callable[[Tensor], Tensor], labels: Labels | None = None) -> Level:
    changed = {f.name: change(v) for f in fields(level) if isinstance(v := getattr(level, f.name), Tensor)}
    return replace(level, **changed, labels=labels or level.labels)


def no_labels(level: Level) -> None:
    level.labels = Labels(torch.empty(0, dtype=torch.long), torch.empty(0, 4))


def awkward_labels(level: Level) -> None:
    """Boxes with no area, of NaN, beyond the image, over all of it, and twice the same."""
    corners = [
        [0.5, 0.5, 0.5, 0.9],
        [math.nan] * 4,
        [0.9, -0.5, 1.6, 0.2],
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [0.3, 0.3, 0.2, 0.1],
    ]
    level.labels = Labels(torch.tensor([0, 0, 0, 0, 0, 1]), torch.tensor(corners))


def edited(edit: Callable[[Level], None], b: int = 2, h: int = 4, w: int = 3) -> Level:
    level = random_level(b, h, w)
    edit(level)
    return level


def fill(value: float) -> Callable[[Level], None]:
    def edit(level: Level) -> None:
        for t in tensors(level):
            t.fill_(value)

    return edit


def one_hot(level: Level) -> None:
    fill(0.0)(level)
    level.teacher[:, 0, 1, 2] = 50.0
    assert level.teacher_logits is not None
    level.teacher_logits[:, 1, 1, 2] = 30.0


def saturated(level: Level) -> None:
    assert level.teacher_logits is not None
    assert level.student_logits is not None
    level.teacher_logits.fill_(25.0)
    level.student_logits.fill_(-25.0)


LEVELS = {
    "random": random_level(2, 4, 6),
    "tall": random_level(1, 7, 2, seed=1),
    "one position": random_level(3, 1, 1, seed=2),
    "batch of one": random_level(1, 3, 3, seed=3),
    "all zero": edited(fill(0.0)),
    "constant": edited(fill(1.5)),
    "one hot": edited(one_hot),
    "saturated": edited(saturated),
    "no labels": edited(no_labels),
    "awkward labels": edited(awkward_labels),
}


def inverse_of(level: Level) -> np.ndarray[Any, Any]:
    b, _, h, w = level.student.shape
    assert level.labels is not None
    return reference.inverse_areas(level.labels.image.tolist(), level.labels.corners.double().numpy(), b, h, w)


def parameters(module: nn.Module) -> list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Return weight and bias of each layer, in order."""
    arrays = [p.detach().numpy() for p in module.parameters()]
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def adapted(method: Any, level: Level) -> np.ndarray[Any, Any]:
    return np.asarray(method.adapt(level.student).detach())


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("regions", ["both", "high", "low"])
@pytest.mark.parametrize("constraint", ["mixed", "plain", "transformed", "swapped", "low_both"])
@pytest.mark.parametrize(("width", "hidden"), [("student", 1.0), ("teacher", 1.0), ("teacher", 0.4)])
def test_dfd_equals_the_reference(level: Level, regions: str, constraint: str, width: str, hidden: float) -> None:
    method: Any = build("dfd", alpha=0.7, beta=1.3, regions=regions, constraint=constraint, width=width, hidden=hidden)
    transformed = adapted(method, level)
    if method.transform is not None and width == "student":
        through = reference.generator(level.student.numpy(), *parameters(method.transform))
        transformed = np.asarray(method.adapt(torch.as_tensor(through)).detach())
    elif method.transform is not None:
        transformed = reference.generator(transformed, *parameters(method.transform))
    expected = reference.dfd(level.teacher.numpy(), adapted(method, level), transformed, 0.7, 1.3, regions, constraint)
    # float32 attention and distances inside, float64 in the reference
    assert float(method(level)) == pytest.approx(expected, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_dfd_without_its_transformation_and_with_equal_weights_is_fitnet(level: Level) -> None:
    plain, fitnet = build("dfd", constraint="plain", alpha=1.0, beta=1.0), build("fitnet")
    assert loss(plain, level) == close(loss(fitnet, level))  # built with the same seed, so with the same adapter
    apart = build("dfd", constraint="plain", alpha=2.0, beta=1.0)
    assert loss(apart, level) >= loss(fitnet, level) * (1 - 1e-6)


@pytest.mark.parametrize("case", LEVELS)
@pytest.mark.parametrize("distance", ["l2", "euclidean", "l1", "kl"])
@pytest.mark.parametrize("weighting", ["soft", "uniform"])
def test_pdf_equals_the_reference(case: str, distance: str, weighting: str) -> None:
    assert_pdf_equals_the_reference(LEVELS[case], distance, weighting)


@pytest.mark.parametrize("case", ["random", "tall", "one position", "batch of one"])
@pytest.mark.parametrize("distance", ["l2", "euclidean", "l1", "kl"])
@pytest.mark.parametrize("weighting", HARD)
def test_hard_pdf_equals_the_reference(case: str, distance: str, weighting: str) -> None:
    assert_pdf_equals_the_reference(LEVELS[case], distance, weighting)


def assert_pdf_equals_the_reference(level: Level, distance: str, weighting: str) -> None:
    method: Any = build("pdf", distance=distance, weighting=weighting)
    expected = reference.pdf(
        level.teacher.numpy(),
        adapted(method, level),
        level.teacher_logits.numpy(),
        level.student_logits.numpy(),
        distance,
        weighting,
    )
    assert float(method(level)) == pytest.approx(expected, rel=2e-5, abs=1e-7)


PYRAMIDS = {
    "random": [random_level(2, 4, 6), random_level(2, 2, 3, seed=1), random_level(2, 1, 2, seed=2)],
    "batch of one": [random_level(1, 5, 3), random_level(1, 3, 2, seed=1)],
    "one level": [random_level(3, 3, 3)],
    "agreement at one level": [random_level(2, 4, 3), edited(fill(0.5))],
    "agreement everywhere": [edited(fill(0.5)), edited(fill(0.0), h=2, w=2)],
    "one hot": [edited(one_hot), random_level(2, 2, 2, seed=3)],
    "saturated": [edited(saturated), random_level(2, 2, 2, seed=4)],
}


@pytest.mark.parametrize("distance", ["l2", "euclidean", "l1", "kl"])
@pytest.mark.parametrize(
    ("case", "weighting"),
    [
        *((case, weighting) for case in PYRAMIDS for weighting in ("soft", "uniform")),
        *((case, weighting) for case in ("random", "batch of one", "one level") for weighting in HARD),
    ],
)
def test_pdf_over_the_batch_equals_the_reference(case: str, weighting: str, distance: str) -> None:
    levels = PYRAMIDS[case]
    methods: list[Any] = [build("pdf", distance=distance, weighting=weighting, scope="batch") for _ in levels]
    arrays = [
        (level.teacher.numpy(), adapted(method, level), level.teacher_logits.numpy(), level.student_logits.numpy())
        for method, level in zip(methods, levels, strict=True)
    ]
    expected = reference.pdf_over_the_batch(arrays, distance, weighting)
    losses = [float(value) for value in methods[0].losses(methods, levels)]
    assert losses == [close(value) for value in expected]


def test_pdfs_scopes_agree_for_one_image_at_one_level_and_differ_for_several() -> None:
    level, batch = random_level(1, 4, 3), random_level(2, 4, 3)
    per_level, over_batch = build("pdf", scope="level"), build("pdf", scope="batch")
    assert loss(over_batch, level) == pytest.approx(loss(per_level, level), rel=1e-6)
    assert loss(over_batch, batch) != pytest.approx(loss(per_level, batch), rel=1e-3)
    batch.student_logits[0] = batch.teacher_logits[0]  # now the models agree on the first image
    changed = replace(batch, teacher=batch.teacher.clone())
    changed.teacher[0] += 1
    assert loss(over_batch, changed) == loss(over_batch, batch)
    assert loss(per_level, changed) != loss(per_level, batch)


def test_pdf_over_the_batch_sees_all_levels_in_a_composition() -> None:
    parts = parse({"teacher": "t", "method": "fitnet+pdf", "pdf.scope": "batch"}).method_configs
    levels = [like(level, Tensor.float) for level in PYRAMIDS["random"]]
    for level, stride in zip(levels, (8, 16, 32), strict=True):
        level.stride = stride
    fitnet, pdf = build_methods(parts, [LevelShape(s, CS, CT) for s in (8, 16, 32)], 0)
    alone = [float(method(level)) for method, level in zip(pdf, levels, strict=True)]
    together = [float(value) for value in pdf(levels)]
    positions = [level.student[:, 0].numel() for level in levels]
    shares = [float(class_disagreement(level.teacher_logits, level.student_logits, "l2").sum()) for level in levels]
    for value, one, share in zip(together, alone, shares, strict=True):
        assert value == pytest.approx(one * len(levels) * share / sum(shares), rel=1e-4)
    assert [float(value) for value in fitnet(levels)] == [float(m(v)) for m, v in zip(fitnet, levels, strict=True)]
    assert sum(positions) > 3 * positions[-1]  # levels of different sizes


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_sl2_equals_the_reference(level: Level) -> None:
    method: Any = build("sl2")
    projected = np.asarray(method.project(level.student).detach())
    expected = reference.sl2(level.teacher.numpy(), projected, level.teacher_mean_logits.numpy())
    assert float(method(level).detach()) == pytest.approx(expected, rel=2e-5, abs=1e-7)


def close(expected: float) -> Any:
    return pytest.approx(expected, rel=3e-5, abs=1e-7)  # float32 inside, float64 in the reference


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
class TestLossEqualsTheReference:
    def test_fitnet(self, level: Level) -> None:
        method = build("fitnet")
        assert loss(method, level) == close(reference.fitnet(level.teacher.numpy(), adapted(method, level)))

    def test_pkd(self, level: Level) -> None:
        method = build("pkd")
        assert loss(method, level) == close(reference.correlation_loss(level.teacher.numpy(), adapted(method, level)))

    @pytest.mark.parametrize("tau", [1.0, 4.0])
    def test_cwd(self, level: Level, tau: float) -> None:
        method = build("cwd", tau=tau)
        # float32 cannot hold probabilities near 1e-40
        assert loss(method, level) == pytest.approx(
            reference.cwd(level.teacher.numpy(), adapted(method, level), tau), rel=1e-4, abs=1e-5
        )

    @pytest.mark.parametrize(("masked", "hidden"), [(0.0, 1.0), (0.65, 1.0), (0.65, 0.4)])
    def test_mgd(self, level: Level, masked: float, hidden: float) -> None:
        method: Any = build("mgd", lambda_=masked, hidden=hidden)
        assert method.generate[0].out_channels == max(round(hidden * CT), 1)
        kept = method.draw_mask(level)
        assert masked > 0 or kept.all()
        rebuilt = reference.generator(adapted(method, level) * kept.numpy(), *parameters(method.generate))
        assert loss(method, level) == close(reference.fitnet(level.teacher.numpy(), rebuilt))

    @pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.0, 2.0), (3.0, 0.0)])
    def test_frs(self, level: Level, alpha: float, beta: float) -> None:
        method = build("frs", alpha=alpha, beta=beta)
        logits = level.teacher_logits.numpy(), level.student_logits.numpy()
        expected = reference.frs(level.teacher.numpy(), adapted(method, level), *logits, alpha, beta)
        assert loss(method, level) == close(expected)

    @pytest.mark.parametrize(("alpha_1", "alpha_2"), [(1.0, 4.0), (0.0, 2.0), (3.0, 0.0)])
    def test_bckd(self, level: Level, alpha_1: float, alpha_2: float) -> None:
        pairs = [
            (teacher.numpy(), student.numpy())
            for teacher, student in (
                (level.teacher_logits, level.student_logits),
                (level.teacher_boxes, level.student_boxes),
            )
        ]
        expected = reference.bckd(*pairs, alpha_1, alpha_2)
        assert loss(build("bckd", alpha_1=alpha_1, alpha_2=alpha_2), level) == close(expected)

    @pytest.mark.parametrize(("alpha", "beta", "gamma"), [(1.0, 1.0, 2.0), (0.0, 2.0, 1.0), (3.0, 0.0, 1.5)])
    @pytest.mark.parametrize(
        ("box", "region", "depth"),
        [("giou", "assigned", 0), ("kl", "assigned", 2), ("giou", "confident", 0), ("giou", "confident", 1)],
    )
    def test_crosskd(
        self, level: Level, alpha: float, beta: float, gamma: float, box: str, region: str, depth: int
    ) -> None:
        method: Any = build("crosskd", alpha=alpha, beta=beta, gamma=gamma, box=box, region=region, depth=depth)
        if depth:
            box_maps, class_maps = level.head_maps[depth]
            # Without a weight for boxes, the method has no adapter for them.
            boxes_too: Any = method if beta else build("crosskd", box=box, depth=depth)
            crossed = method.adapt_classes(class_maps), boxes_too.adapt_boxes(box_maps)
        else:
            crossed = method.adapt(level.student), method.adapt(level.student)
        for i in range(depth, 3):
            layers = HEAD.class_layers[i], HEAD.box_layers[i]
            crossed = tuple(layer(maps.detach()) for layer, maps in zip(layers, crossed, strict=True))
        logits = level.teacher_logits.numpy(), crossed[0].numpy()
        raw = crossed[1].unflatten(1, (4, BINS)).numpy()
        if box == "kl":
            distance = reference.box_divergence(level.teacher_box_logits.numpy(), raw, 1.0)
        else:
            boxes, own = reference.decoded(raw), level.teacher_boxes.numpy()
            distance = np.zeros(level.assigned.shape)
            for n, i, j in np.ndindex(*distance.shape):
                distance[n, i, j] = 1 - reference.giou(own[n, :, i, j], boxes[n, :, i, j])
        weights = level.assigned.numpy() if region == "assigned" else level.teacher_logits.sigmoid().amax(1).numpy()
        expected = reference.crosskd(logits, distance, weights, alpha, beta, gamma)
        assert loss(method, level) == pytest.approx(expected, rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize(("tau", "gamma", "weights"), [(10.0, 0.25, (0.25, 0.25)), (1.0, 0.0, (0.3, 2.0))])
    def test_ld(self, level: Level, tau: float, gamma: float, weights: tuple[float, float]) -> None:
        method: Any = build("ld", tau=tau, gamma=gamma, main=weights[0], valuable=weights[1])
        _, _, h, w = level.student.shape
        labels = level.labels.image.tolist(), level.labels.corners.double().numpy()
        region = reference.valuable_region(*labels, len(level.student), (8 * h, 8 * w), (8,), 8, gamma)
        assert np.array_equal(method.region(level).numpy(), region)
        boxes = level.teacher_box_logits.numpy(), level.student_box_logits.numpy()
        expected = reference.ld(*boxes, level.assigned.numpy(), region, tau, weights)
        assert loss(method, level) == pytest.approx(expected, rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0.3, 0.2, 0.7, 0.5)])
    def test_fgd(self, level: Level, weights: tuple[float, ...]) -> None:
        names = ("alpha", "beta", "gamma", "lambda_")
        method: Any = build("fgd", temperature=0.5, **{k: float(v) for k, v in zip(names, weights, strict=True)})
        student = adapted(method, level)
        assert torch.equal(method.context(level.teacher), level.teacher)
        with torch.no_grad():  # as after some training
            for parameter in method.context.parameters():
                parameter.normal_()
        key, narrow, norm, wide = parameters(method.context)
        contexts = tuple(
            reference.global_context(maps, key, narrow, norm, wide) for maps in (level.teacher.numpy(), student)
        )
        expected = reference.fgd(level.teacher.numpy(), student, contexts, inverse_of(level), *weights, 0.5)
        assert loss(method, level) == close(expected)

    @pytest.mark.parametrize(("stage", "hidden"), [(0, 1.0), (1, 0.4), (30, 1.0)])
    def test_dfmsd(self, level: Level, stage: int, hidden: float) -> None:
        values = {k: v for k, v in method_defaults("dfmsd").items() if k not in METHOD_SETTINGS} | {"hidden": hidden}
        torch.manual_seed(0)
        method: Any = registered()["dfmsd"](LevelShape(8, CS, CT, stage), **values).double()
        with torch.no_grad():
            method.mix.copy_(torch.tensor([0.4, -0.3]))
        inside = min(0.5 * (1 + 0.15 * stage), 0.95)
        spatial, channel = reference.dfmsd_masks(level.teacher.numpy(), inverse_of(level), 0.5, inside, 0.15)
        student = adapted(method, level)
        by_position = reference.generator(student * spatial[:, None], *parameters(method.by_position))
        by_channel = reference.generator(student * channel[:, :, None, None], *parameters(method.by_channel))
        first = 1 / (1 + math.exp(-0.7))
        rebuilt = first * by_position + (1 - first) * by_channel
        expected = reference.correlation_loss(level.teacher.numpy(), rebuilt)
        assert loss(method, level) == pytest.approx(expected, rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("box", [0.5, 3.0])
    def test_pdf_with_boxes(self, level: Level, box: float) -> None:
        method = build("pdf", box=box)
        images, _, h, w = level.student.shape
        t_logits, s_logits = level.teacher_logits.numpy(), level.student_logits.numpy()
        weights = np.ones((images, h, w))
        for n in range(images):
            d = reference.disagreement(t_logits[n], s_logits[n], "l2")
            for i in range(h):
                for j in range(w):
                    overlap = reference.iou(
                        level.teacher_boxes[n, :, i, j].numpy(), level.student_boxes[n, :, i, j].numpy()
                    )
                    top = max(reference.sigmoid(v) for v in t_logits[n, :, i, j])
                    d[i, j] += box * top * (1 - overlap)
            weights[n] = h * w * d / d.sum() if d.sum() else 1
        errors = (level.teacher.numpy() - adapted(method, level)) ** 2
        assert loss(method, level) == close(float((weights[:, None] * errors).mean()))


def loss(method: Method, level: Level) -> float:
    return float(method(level).detach())


def test_pkd_is_one_minus_pearsons_correlation() -> None:
    level, method = random_level(2, 5, 4), build("pkd")
    student = adapted(method, level)
    pearson = [np.corrcoef(level.teacher[:, k].numpy().ravel(), student[:, k].ravel())[0, 1] for k in range(CT)]
    assert loss(method, level) == pytest.approx(1 - np.mean(pearson), rel=1e-4)


@pytest.mark.parametrize(("deviation", "fraction"), [(1.0, 1.0), (1e-3, 0.5), (0.0, 0.0)])
def test_pkd_counts_channels_less_whose_standard_deviation_is_near_1e_3(deviation: float, fraction: float) -> None:
    level, method = random_level(2, 5, 4), build("pkd")
    method.adapt = nn.Identity()
    teacher, student = (standardized(maps) for maps in (level.teacher[:, :CS], level.student))
    one_minus_r = float(1 - (teacher * student).mean())
    faint = Level(8, deviation * student, deviation * teacher)
    assert loss(method, faint) == pytest.approx(fraction * one_minus_r, rel=1e-4)


def test_mgds_masks_depend_on_the_steps_seed_alone() -> None:
    method: Any = build("mgd")
    first, again, other = (method.draw_mask(replace(random_level(4, 8, 8), seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    before = torch.get_rng_state()
    method(random_level(2, 4, 4))
    assert torch.equal(before, torch.get_rng_state())  # augmentations draw from this stream


def test_mgd_masks_the_chosen_fraction_of_positions() -> None:
    kept = build("mgd", lambda_=0.65).draw_mask(random_level(4, 40, 40))  # type: ignore[operator]
    assert float(kept.float().mean()) == pytest.approx(0.35, abs=0.02)


def test_frs_also_trains_the_class_scores() -> None:
    level = random_level(2, 4, 4)
    level.student_logits.requires_grad_()
    build("frs", alpha=0.0)(level).backward()
    assert level.student_logits.grad.abs().sum() > 0


def test_frs_does_not_teach_the_one_to_one_head_of_an_end_to_end_student() -> None:
    student, batch = random_detector(YOLO26N, seed=1), two_images()
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(), student, method="frs", **{"frs.warmup": 0, "frs.alpha": 0})
    losses, _ = criterion(student(batch["img"]), batch)
    losses[-1].backward()
    head = student.model[-1]
    taught, untaught = (
        [p.grad is not None and bool(p.grad.any()) for p in m.parameters()] for m in (head.cv3, head.one2one_cv3)
    )
    assert any(taught)
    assert not any(untaught)


def test_bckd_trains_scores_and_boxes_and_its_weights_carry_no_gradient() -> None:
    level, method = random_level(2, 4, 4), build("bckd", alpha_1=0.7, alpha_2=1.3)
    predictions = [level.student_logits.requires_grad_(), level.student_boxes.requires_grad_()]
    ours = torch.autograd.grad(method(level), predictions)
    target = level.teacher_logits.sigmoid()
    weights = (target - level.student_logits.sigmoid()).abs().detach()
    scores = (weights * F.binary_cross_entropy_with_logits(level.student_logits, target, reduction="none")).sum(1)
    boxes = weights.amax(1) * (1 - iou(level.student_boxes, level.teacher_boxes))
    expected = torch.autograd.grad((0.7 * scores + 1.3 * boxes).mean(), predictions)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_bckds_gradients_of_boxes_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    level, method = random_level(2, 3, 2, seed=4), build("bckd")
    boxes = (level.student_boxes + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda boxes: method(replace(level, student_boxes=boxes)), [boxes])


def test_bckd_is_zero_for_identical_predictions() -> None:
    level = random_level(1, 3, 3)
    same = replace(level, student_logits=level.teacher_logits, student_boxes=level.teacher_boxes)
    assert loss(build("bckd"), same) == 0


def test_crosskd_is_zero_for_the_teachers_own_map() -> None:
    level = random_level(2, 4, 4)
    for box in ("giou", "kl"):
        method: Any = build("crosskd", box=box)
        method.adapt = nn.Identity()
        own = HEAD.box_logits(level.teacher)
        same = replace(level, student=level.teacher, teacher_logits=HEAD.class_logits(level.teacher))
        same.teacher_box_logits, same.teacher_boxes = own, decode_distances(own.flatten(1, 2), BINS)
        assert loss(method, same) == pytest.approx(0, abs=1e-5)


def test_crosskd_leaves_the_teachers_head_and_the_students_predictions_alone() -> None:
    level = random_level(2, 4, 4)
    read = [level.student_logits, level.student_boxes, level.student_box_logits]
    for tensor in (level.student, *read):
        tensor.requires_grad_()
    before = [p.clone() for layers in (HEAD.box_layers, HEAD.class_layers) for p in layers.parameters()]
    build("crosskd")(level).backward()
    after = [p for layers in (HEAD.box_layers, HEAD.class_layers) for p in layers.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, after, strict=True))
    assert float(level.student.grad.abs().sum()) > 0
    assert all(tensor.grad is None for tensor in read)


def test_crosskds_gradients_behind_layers_of_the_head_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    level, method = random_level(2, 3, 2, seed=4), build("crosskd", depth=1, gamma=1.5)
    maps = [m.requires_grad_() for m in level.head_maps[1]]
    assert torch.autograd.gradcheck(lambda *maps: method(replace(level, head_maps={1: maps})), maps)


def test_crosskd_refuses_distributions_that_the_teacher_does_not_predict() -> None:
    config = parse({"teacher": "t", "method": "crosskd", "crosskd.box": "kl"}).method_configs
    single = LevelShape(8, CS, CT, teacher_head=HeadShape(1, (CT,), (CT,)))
    with pytest.raises(UserError, match=r"crosskd.box=kl: .*reg_max=1\) \(use crosskd.box=giou"):
        build_methods(config, [single], seed=0)


def test_methods_that_compare_predictions_need_a_head_that_predicts_at_every_position() -> None:
    methods = registered()
    assert {n for n in NAMES if methods[n].wants_dense_head()} == {"bckd", "crosskd", "frs", "ld", "pdf", "sl2"}


def test_ld_trains_the_students_distributions_in_both_regions_alone() -> None:
    level, method = random_level(2, 5, 6), build("ld")
    box_logits = level.student_box_logits.requires_grad_()
    level.teacher_box_logits.requires_grad_(False)
    (gradient,) = torch.autograd.grad(method(level), box_logits)
    regions = level.assigned | method.region(level)  # type: ignore[operator]
    assert torch.equal(gradient.abs().sum((1, 2)) > 0, regions)
    assert 0 < int(regions.sum()) < regions.numel()


def test_lds_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    level, method = random_level(2, 3, 2, seed=4), build("ld", tau=2.0)
    inputs = [level.student_box_logits.requires_grad_()]
    assert torch.autograd.gradcheck(lambda logits: method(replace(level, student_box_logits=logits)), inputs)


def test_ld_is_zero_for_identical_distributions_and_without_regions() -> None:
    level, method = random_level(1, 3, 3), build("ld")
    assert loss(method, replace(level, student_box_logits=level.teacher_box_logits)) == 0
    no_labels(level)
    assert loss(method, replace(level, assigned=torch.zeros(1, 3, 3) > 0)) == 0


@pytest.mark.parametrize(
    ("bins", "message"),
    [
        ((16, 1), r"the student's head predicts single distances \(reg_max=1\) \(use bckd"),
        ((1, 16), "the teacher's head predicts single distances"),
        ((16, 8), "over 16 bins in the teacher's head, over 8 in the student's"),
    ],
)
def test_ld_refuses_heads_without_or_with_other_distributions(bins: tuple[int, int], message: str) -> None:
    teacher, student = (HeadShape(count, (8,), (8,)) for count in bins)
    with pytest.raises(UserError, match=f"method=ld: .*{message}"):
        build_methods(
            parse({"teacher": "t", "method": "ld"}).method_configs,
            [LevelShape(8, CS, CT, student_head=student, teacher_head=teacher)],
            seed=0,
        )


def test_disagreement_is_not_negative_where_scores_are_almost_equal() -> None:
    """Float32 cancels there."""
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 2, 8, 8, generator=g)
    weights = class_disagreement(teacher, teacher + 1e-4 * torch.randn(1, 2, 8, 8, generator=g), "kl")
    assert float(weights.min()) >= 0


def test_pdfs_box_disagreement_is_zero_where_the_teacher_detects_nothing() -> None:
    level = random_level(1, 3, 3)
    level.teacher_logits.fill_(-60.0)
    assert float(box_disagreement(level).max()) < 1e-20


@pytest.mark.parametrize("name", NAMES)
def test_all_zero_maps_give_finite_losses_and_gradients(name: str) -> None:
    level, method = edited(fill(0.0)), build(name)
    read = (level.student, level.student_logits, level.student_boxes, level.student_box_logits)
    inputs = [t.requires_grad_() for t in read]
    result = method(level)
    result.backward()
    assert torch.isfinite(result)
    assert all(t.grad is None or torch.isfinite(t.grad).all() for t in inputs)


@pytest.mark.parametrize("composition", ["dfd+mgd", "dfd+pkd", "+".join(NAMES)])
def test_a_methods_loss_is_the_same_alone_and_in_a_composition(composition: str) -> None:
    parts = parse({"teacher": "t", "method": composition}).method_configs
    level = like(random_level(2, 4, 4), Tensor.float)
    methods = [per_level[0] for per_level in build_methods(parts, [LevelShape(8, CS, CT)], 0)]
    together = [loss(m, level) for m in methods]
    assert together == [loss(m, like(level, lambda t: t)) for m in methods]


@pytest.mark.parametrize("case", ["all zero", "constant", "one hot", "saturated"])
@pytest.mark.parametrize("weighting", HARD)
def test_hard_pdf_selects_the_right_number_of_positions_among_equal_ones(case: str, weighting: Any) -> None:
    level = LEVELS[case]
    d = class_disagreement(level.teacher_logits, level.student_logits, "l2")
    weights = position_weights(d, weighting)
    fraction = 0.25 if weighting.endswith("25") else 0.5
    assert ((weights > 0).sum((1, 2)) == round(fraction * d[0].numel())).all()
    assert torch.allclose(weights.mean((1, 2)), torch.ones(len(d)))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in {"bckd", "ld"}])  # tested above
def test_gradients_equal_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradcheck needs float64: the methods' casts to float32 become casts to float64."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    level, method = random_level(2, 3, 2, seed=4), build(name)

    def loss(student: Tensor, student_logits: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            method,
            dict(zip(names, parameters, strict=True)),
            (replace(level, student=student, student_logits=student_logits if reads_logits else level.student_logits),),
        )

    reads_logits = name == "frs"  # other methods use them as weights, without gradient
    names = [n for n, _ in method.named_parameters()]
    # Away from their initial values: behind a layer of zeros every gradient would be 0.
    parameters = [p.detach() + 0.1 * torch.randn_like(p) for p in method.parameters()]
    inputs = [level.student.clone(), level.student_logits.clone(), *parameters]
    assert torch.autograd.gradcheck(loss, [i.requires_grad_() for i in inputs])


@pytest.mark.parametrize("scope", ["level", "batch"])
def test_pdfs_weights_carry_no_gradient(scope: str) -> None:
    """PDF's loss trains the maps, not the class scores and boxes that weight them."""
    level = random_level(2, 4, 4)
    level.student.requires_grad_()
    level.student_logits.requires_grad_()
    assert level.student_boxes is not None
    level.student_boxes.requires_grad_()
    build("pdf", box=1.0, scope=scope)(level).backward()
    assert level.student.grad is not None
    assert level.student_logits.grad is None
    assert level.student_boxes.grad is None


def test_dfds_split_carries_no_gradient() -> None:
    """DFD's gradient equals that of its two errors with the split held constant."""
    level, method = random_level(2, 4, 4), build("dfd", alpha=0.7, beta=1.3)
    level.student.requires_grad_()
    (ours,) = torch.autograd.grad(method(level), level.student)
    adapted_map = method.adapt(level.student)
    high = high_disparity(level.teacher, adapted_map.detach())
    plain = (adapted_map - level.teacher).square().mean(1)
    through = (method.transform(adapted_map) - level.teacher).square().mean(1)
    fixed = (torch.where(high, 0.7 * through, 1.3 * plain)).mean()
    (expected,) = torch.autograd.grad(fixed, level.student)
    assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-7)


def test_losses_leave_their_inputs_unchanged() -> None:
    for name in NAMES:
        level = random_level(2, 4, 4)
        before = level.teacher.clone(), level.teacher_logits.clone(), level.student.clone()
        build(name)(level)
        assert torch.equal(before[0], level.teacher)
        assert torch.equal(before[1], level.teacher_logits)
        assert torch.equal(before[2], level.student)


@pytest.mark.parametrize(("name", "constants"), [*((name, {}) for name in NAMES), ("pdf", {"scope": "batch"})])
def test_losses_are_means_over_the_batch(name: str, constants: dict[str, Any]) -> None:
    """Repeating the images of a batch does not change a loss."""
    level: Level = random_level(2, 4, 4)
    method: Any = build(name, **constants)
    labels = Labels(torch.cat([level.labels.image, level.labels.image + 2]), level.labels.corners.repeat(2, 1))
    if name == "mgd":  # its masks differ between images
        method.draw_mask = lambda level: torch.ones_like(level.student[:, :1]) > 0
    twice = like(level, lambda t: torch.cat([t, t]), labels)
    assert float(method(twice)) == pytest.approx(float(method(level)), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_maps_give_float32_losses(name: str) -> None:
    level = random_level(2, 4, 4)
    method = build(name).bfloat16()
    low = like(level, Tensor.bfloat16)
    loss = method(low)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(build(name)(level)), rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_half_precision_teacher_teaches_a_float32_student(name: str) -> None:
    level = like(random_level(2, 4, 4), Tensor.float)
    method = build(name).float()
    expected = float(method(level))
    level = like(level, Tensor.float)
    level.teacher = level.teacher.bfloat16()
    assert float(method(level)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("scope", ["level", "batch"])
def test_scores_that_are_nan_give_a_loss_that_is_nan(scope: str) -> None:
    level = random_level(2, 4, 4)
    level.student_logits[0, 0, 0, 0] = math.nan
    assert math.isnan(float(build("pdf", scope=scope)(level)))


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 5), st.floats(0, 80))
def test_attention_is_a_distribution_of_mean_one(b: int, c: int, h: int, w: int, scale: float) -> None:
    maps = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(0)) * scale
    attention = spatial_attention(maps)
    assert attention.shape == (b, h, w)
    assert torch.isfinite(attention).all()
    assert torch.allclose(attention.mean((1, 2)), torch.ones(b), atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=6))
def test_disagreement_is_finite_on_any_logits(logits: list[float]) -> None:
    t = torch.tensor(logits).view(1, 1, 1, -1)
    for distance in ("l2", "euclidean", "l1", "kl"):
        d = class_disagreement(t, -t, distance)  # type: ignore[arg-type]
        assert torch.isfinite(d).all()
        assert (d >= 0).all()
        assert torch.isfinite(position_weights(d, "soft")).all()


def test_pdf_is_zero_for_identical_models() -> None:
    level = random_level(1, 3, 3)
    method: Any = build("pdf")
    method.adapt = nn.Identity()
    same = Level(8, level.teacher, level.teacher, level.teacher_logits, level.teacher_logits)
    assert float(method(same)) == 0


def record_calls(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_composed_methods_use_one_adapter_and_run_it_once() -> None:
    shape = LevelShape(8, CS, CT)
    dfd, pdf, sl2 = (
        p[0] for p in build_methods(parse({"teacher": "t", "method": "dfd+pdf+sl2"}).method_configs, [shape], 0)
    )
    assert dfd.adapt is pdf.adapt
    level = random_level(2, 4, 4)
    single = like(level, Tensor.float)
    calls = record_calls(dfd.adapt)
    together = [float(m(single).detach()) for m in (dfd, pdf, sl2)]
    assert len(calls) == 1
    apart = [float(m(like(single, lambda t: t)).detach()) for m in (dfd, pdf, sl2)]
    assert together == apart


def test_two_adapters_of_one_method_are_not_merged() -> None:
    class Two(Method):
        def __init__(self, shape: LevelShape) -> None:
            super().__init__()
            self.a, self.b = Adapter(shape), Adapter(shape)
            self.c = Adapter(LevelShape(shape.stride, shape.student_channels, 1))

    register("two_adapters")(Two)
    pdf, two = (p[0] for p in build_methods(parse({"teacher": "t", "method": "pdf+two_adapters"}).method_configs,
                                            [LevelShape(8, CS, CT)], 0))  # fmt: skip
    assert two.a is pdf.adapt
    assert two.b is not two.a
    assert two.c.out_channels == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_adapters_between_layers_of_heads_are_dropped_at_equal_channels_too(depth: int) -> None:
    head = HeadShape(BINS, (CT, 7, 2), (CT, 7, 5))
    shape = LevelShape(8, CS, CT, student_head=head, teacher_head=head)
    parts = parse({"teacher": "t", "method": "crosskd", "crosskd.depth": depth}).method_configs
    method = build_methods(parts, [shape], 0, "identity_if_equal")[0][0]
    assert not any(isinstance(module, nn.Conv2d) for module in method.modules())


WITH_ADAPTERS = [name for name in NAMES if name not in {"bckd", "ld"}]


@pytest.mark.parametrize(("name", "keys"), [*((name, {}) for name in WITH_ADAPTERS), ("dfd", {"dfd.width": "student"})])
def test_a_method_without_adapters_equals_one_whose_adapters_are_the_identity(name: str, keys: dict[str, Any]) -> None:
    parts = parse({"teacher": "t", "method": name, **keys}).method_configs
    given, dropped = (
        build_methods(parts, [LevelShape(8, CT, CT)], 0, kind)[0][0] for kind in ("conv", "identity_if_equal")
    )
    for adapter in (m for m in given.modules() if isinstance(m, Adapter)):
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    assert not any(isinstance(m, Adapter) for m in dropped.modules())
    state = given.state_dict()  # the other parts begin with the same weights
    assert all(torch.equal(state[key], value) for key, value in dropped.state_dict().items())
    level = like(random_level(2, 4, 5), Tensor.float)
    level = replace(level, student=torch.randn(2, CT, 4, 5, generator=torch.Generator().manual_seed(1)))
    results = []
    for method in (given, dropped):
        leaves = [t.requires_grad_() for t in (level.student.clone(), level.student_logits.clone())]
        value = method(replace(level, student=leaves[0], student_logits=leaves[1]))
        results.append((value, *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_adapters_are_dropped_only_between_equal_channels_and_identities_are_shared() -> None:
    parts = parse({"teacher": "t", "method": "fitnet+pdf"}).method_configs
    shapes = [LevelShape(8, CS, CT), LevelShape(16, CT, CT)]
    fitnet, pdf = build_methods(parts, shapes, 0, "identity_if_equal")
    assert isinstance(fitnet[0].adapt, Adapter)
    assert isinstance(fitnet[1].adapt, nn.Identity)
    assert fitnet[0].adapt is pdf[0].adapt
    assert fitnet[1].adapt is pdf[1].adapt
    with_adapters = build_methods(parts, shapes, 0)
    for key, value in fitnet[0].state_dict().items():
        assert torch.equal(value, with_adapters[0][0].state_dict()[key])


def test_a_student_learns_from_a_teacher_of_equal_channels_without_adapters() -> None:
    student, batch = random_detector(seed=1), two_images()
    student.args = get_cfg()
    criterion = attach_criterion(random_detector(), student, method="fitnet+mgd", adapter="identity_if_equal")
    names = {name.rpartition(".")[0] for name in criterion.private_state() if "methods" in name}
    assert names == {f"stages.0.methods.1.{level}.generate.{layer}" for level in range(3) for layer in (0, 2)}
    losses, _ = criterion(student(batch["img"]), batch)
    losses[-2:].sum().backward()
    assert torch.isfinite(losses).all()
    assert all(parameter.grad is not None for parameter in criterion.parameters())
    assert student.model[0].conv.weight.grad.abs().sum() > 0
    criterion.load_private_state({key: value.clone() for key, value in criterion.private_state().items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_squared_error_of_half_precision_maps_keeps_no_float32_map(dtype: torch.dtype) -> None:
    """Its values and gradients are those of the maps in float32; for the backward pass it keeps the maps themselves."""
    g = torch.Generator().manual_seed(0)
    a, b, weights = (torch.randn(*size, generator=g) for size in ((2, 8, 4, 5), (2, 8, 4, 5), (2, 8)))
    for types in ((dtype, dtype), (torch.float32, dtype), (dtype, torch.float32)):
        low = [maps.to(t).requires_grad_() for maps, t in zip((a, b), types, strict=True)]
        full = [maps.detach().float().requires_grad_() for maps in low]
        for w in (None, weights):
            error, expected = squared_error(*low, w), squared_error(*full, w)
            assert all(kept is None or any(kept is t for t in (*low, w)) for kept in error.grad_fn.saved_tensors)
            assert torch.equal(error, expected)
            gradients = (torch.autograd.grad(e.square().sum(), maps) for e, maps in ((error, low), (expected, full)))
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs.to(ours.dtype))


@pytest.mark.parametrize("name", ["cwd", "dfd", "dfmsd", "fgd", "fitnet", "frs", "mgd", "pdf", "pkd", "sl2"])
def test_a_method_keeps_no_float32_map_of_maps_in_half_precision(name: str) -> None:
    low = like(random_level(2, 16, 16), lambda t: t.bfloat16() if t.is_floating_point() else t)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    method = build(name).float()
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = method(replace(low, student=low.student.requires_grad_()))
    assert not [t.shape for t in kept if t.dtype == torch.float32 and t.numel() >= low.teacher.numel()]
    (gradient,) = torch.autograd.grad(loss, [low.student])
    full = like(low, lambda t: t.detach().float() if t.is_floating_point() else t)
    expected = method(replace(full, student=full.student.requires_grad_()))
    (reference_gradient,) = torch.autograd.grad(expected, [full.student])
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.01)
    assert (gradient.float() - reference_gradient).norm() < 0.1 * reference_gradient.norm()


def test_every_process_masks_other_positions_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    criterion = attach_criterion(random_detector(), random_detector(seed=1), method="mgd")
    seeds = []
    for rank in (-1, 0, 1, 2):  # -1: the only process
        monkeypatch.setattr("yolokd.distillation.criterion.RANK", rank)
        for epoch in (0, 1):
            criterion.begin_epoch(epoch, epochs=2, steps=3)
            seeds.append(criterion._draw_seed)
    assert seeds[:2] == seeds[2:4]
    assert len(set(seeds)) == 6
