"""Methods against slow references, on random and adversarial maps, and their gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from yolokd.config import method_defaults, parse
from yolokd.criterion import build_methods
from yolokd.methods import Method, register, registered
from yolokd.methods.blocks import Adapter, spatial_attention
from yolokd.methods.dfd import high_disparity
from yolokd.methods.pdf import disagree, position_weights
from yolokd.pyramid import Level, LevelShape

CS, CT, K = 3, 5, 2
NAMES = ["dfd", "pdf", "sl2"]
HARD = ["most25", "most50", "least25", "least50"]


def build(name: str, **constants: Any) -> Method:
    values = {k: v for k, v in method_defaults(name).items() if k != "gain"} | constants
    torch.manual_seed(0)
    return registered()[name](LevelShape(8, CS, CT), **values).double()


def random_level(b: int, h: int, w: int, seed: int = 0) -> Level:
    g = torch.Generator().manual_seed(seed)

    def draw(c: int, scale: float = 1.0) -> Tensor:
        return torch.randn(b, c, h, w, generator=g, dtype=torch.float64) * scale

    return Level(8, draw(CS), draw(CT), draw(K, 3), draw(K, 3), draw(K, 3))


def tensors(level: Level) -> list[Tensor]:
    return [v for f in fields(level) if isinstance(v := getattr(level, f.name), Tensor)]


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
}


def adapted(method: Any, level: Level) -> np.ndarray[Any, Any]:
    return np.asarray(method.adapt(level.student).detach())


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("regions", ["both", "high", "low"])
@pytest.mark.parametrize("constraint", ["mixed", "plain", "transformed", "swapped"])
@pytest.mark.parametrize("width", ["student", "teacher"])
def test_dfd_equals_the_reference(level: Level, regions: str, constraint: str, width: str) -> None:
    method: Any = build("dfd", alpha=0.7, beta=1.3, regions=regions, constraint=constraint, width=width)
    f_trans = method.transform or (lambda maps: maps)
    student = level.student
    after = method.adapt(f_trans(student)) if width == "student" else f_trans(method.adapt(student))
    transformed = np.asarray(after.detach())
    expected = reference.dfd(level.teacher.numpy(), adapted(method, level), transformed, 0.7, 1.3, regions, constraint)
    # float32 attention and distances inside, float64 in the reference
    assert float(method(level)) == pytest.approx(expected, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("case", LEVELS)
@pytest.mark.parametrize("distance", ["l2", "l1", "kl"])
@pytest.mark.parametrize("weighting", ["soft", "uniform"])
def test_pdf_equals_the_reference(case: str, distance: str, weighting: str) -> None:
    assert_pdf_equals_the_reference(LEVELS[case], distance, weighting)


@pytest.mark.parametrize("case", ["random", "tall", "one position", "batch of one"])
@pytest.mark.parametrize("distance", ["l2", "l1", "kl"])
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


@pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)
def test_sl2_equals_the_reference(level: Level) -> None:
    method: Any = build("sl2")
    projected = np.asarray(method.project(level.student).detach())
    expected = reference.sl2(level.teacher.numpy(), projected, level.teacher_mean_logits.numpy())
    assert float(method(level).detach()) == pytest.approx(expected, rel=2e-5, abs=1e-7)


@pytest.mark.parametrize("case", ["all zero", "constant", "one hot", "saturated"])
@pytest.mark.parametrize("weighting", HARD)
def test_hard_pdf_takes_the_right_number_of_tied_positions(case: str, weighting: Any) -> None:
    level = LEVELS[case]
    d = disagree(level.teacher_logits, level.student_logits, "l2")
    weights = position_weights(d, weighting)
    share = 0.25 if weighting.endswith("25") else 0.5
    assert ((weights > 0).sum((1, 2)) == round(share * d[0].numel())).all()
    assert torch.allclose(weights.mean((1, 2)), torch.ones(len(d)))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """gradcheck in float64; the methods' float32 casts are lifted to float64 for it."""
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    level, method = random_level(2, 3, 2, seed=4), build(name)

    def loss(student: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(
            method,
            dict(zip(names, parameters, strict=True)),
            (replace(level, student=student),),
        )

    names = [n for n, _ in method.named_parameters()]
    inputs = [level.student.clone(), *(p.detach().clone() for p in method.parameters())]
    assert torch.autograd.gradcheck(loss, [i.requires_grad_() for i in inputs])


def test_weights_carry_no_gradient() -> None:
    """PDF's loss pulls at the maps alone, never at the class scores that weight them."""
    level = random_level(2, 4, 4)
    level.student.requires_grad_()
    level.student_logits.requires_grad_()
    build("pdf")(level).backward()
    assert level.student.grad is not None
    assert level.student_logits.grad is None


def test_the_split_carries_no_gradient() -> None:
    """DFD's gradient is that of its two errors under a fixed split."""
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


def test_inputs_stay_unchanged() -> None:
    for name in NAMES:
        level = random_level(2, 4, 4)
        before = level.teacher.clone(), level.teacher_logits.clone(), level.student.clone()
        build(name)(level)
        assert torch.equal(before[0], level.teacher)
        assert torch.equal(before[1], level.teacher_logits)
        assert torch.equal(before[2], level.student)


@pytest.mark.parametrize("name", NAMES)
def test_losses_are_means(name: str) -> None:
    """Repeating the images of a batch leaves a loss as it is."""
    level, method = random_level(2, 4, 4), build(name)
    twice = Level(8, *(torch.cat([t, t]) for t in tensors(level)))
    assert float(method(twice)) == pytest.approx(float(method(level)), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_maps_give_float32_losses(name: str) -> None:
    level = random_level(2, 4, 4)
    method = build(name).bfloat16()
    low = Level(8, *(t.bfloat16() for t in tensors(level)))
    loss = method(low)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(build(name)(level)), rel=0.05)


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
    for distance in ("l2", "l1", "kl"):
        d = disagree(t, -t, distance)  # type: ignore[arg-type]
        assert torch.isfinite(d).all()
        assert (d >= 0).all()
        assert torch.isfinite(position_weights(d, "soft")).all()


def test_identical_models_have_no_pdf_loss() -> None:
    """At equal maps through an identity adapter the loss is zero, and so is its gradient."""
    level = random_level(1, 3, 3)
    method: Any = build("pdf")
    method.adapt = nn.Identity()
    same = Level(8, level.teacher, level.teacher, level.teacher_logits, level.teacher_logits)
    assert float(method(same)) == 0


def counted(module: nn.Module) -> list[int]:
    calls: list[int] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_composed_methods_share_one_adapter_and_run_it_once() -> None:
    shape = LevelShape(8, CS, CT)
    dfd, pdf, sl2 = (p[0] for p in build_methods(parse({"teacher": "t", "method": "dfd+pdf+sl2"}).parts, [shape], 0))
    assert dfd.adapt is pdf.adapt
    level = random_level(2, 4, 4)
    single = Level(8, *(t.float() for t in tensors(level)))
    calls = counted(dfd.adapt)
    together = [float(m(single).detach()) for m in (dfd, pdf, sl2)]
    assert len(calls) == 1
    apart = [float(m(Level(8, *tensors(single))).detach()) for m in (dfd, pdf, sl2)]
    assert together == apart


def test_adapters_of_one_method_stay_its_own() -> None:
    class Two(Method):
        def __init__(self, shape: LevelShape) -> None:
            super().__init__()
            self.a, self.b = Adapter(shape), Adapter(shape)
            self.c = Adapter(LevelShape(shape.stride, shape.student_channels, 1))

    register("two_adapters")(Two)
    pdf, two = (p[0] for p in build_methods(parse({"teacher": "t", "method": "pdf+two_adapters"}).parts,
                                            [LevelShape(8, CS, CT)], 0))  # fmt: skip
    assert two.a is pdf.adapt
    assert two.b is not two.a
    assert two.c.out_channels == 1
