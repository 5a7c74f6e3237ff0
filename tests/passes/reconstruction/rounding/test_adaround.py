"""Learned rounding: both candidates are codes of the format, and the gradients are those of the paper's theorems."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchao.quantization.granularity import PerGroup, PerTensor

from fp4dit_ao.formats import parse
from fp4dit_ao.observers import WeightObserver
from fp4dit_ao.ops import choose_scale
from fp4dit_ao.passes.reconstruction.rounding.adaround import SHIFT, STRETCH, AdaRound, ScaleAwareAdaRound

RULES = [AdaRound, ScaleAwareAdaRound]
FORMATS = ["e2m1", "e3m0", "e1m2", "int4", "e2m3", "e3m2", "e3m4", "e4m3fn", "e1m1", "e2m0", "int8", "nf4"]


def scale_of(weight: torch.Tensor, fmt: str) -> torch.Tensor:
    return choose_scale(weight, [-1, -1], fmt, torch.float32)


def rule(weight: torch.Tensor, fmt: str, kind: type[AdaRound] = AdaRound, group: int | None = None) -> AdaRound:
    observer = WeightObserver(fmt, PerGroup(group) if group else PerTensor())
    return kind(weight, observer.grid(weight))


def dense(fmt: str) -> torch.Tensor:
    """Every level, every midpoint, and points close beside both, with the largest level on absmax."""
    lattice = parse(fmt).lattice.double()
    points = torch.cat([lattice, (lattice[1:] + lattice[:-1]) / 2])
    near = torch.cat([points * (1 + e) for e in (0, 1e-6, -1e-6, 1e-2, -1e-2)])
    return near.clamp(lattice[0], lattice[-1]).float()[None]


def levels(fmt: str, codes: torch.Tensor) -> torch.Tensor:
    return parse(fmt).decode(codes)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_the_candidates_are_neighbouring_levels_that_enclose_the_weight(fmt, kind) -> None:
    weight = dense(fmt)
    rounding = rule(weight, fmt, kind)
    lattice = parse(fmt).lattice.float()
    low, up = levels(fmt, rounding.low), levels(fmt, rounding.up)
    y = (weight / scale_of(weight, fmt)).clamp(lattice[0], lattice[-1])
    assert (low <= y).all()
    assert (y <= up).all()
    above = lattice[(torch.searchsorted(lattice, low) + 1).clamp(max=len(lattice) - 1)]
    assert torch.equal(up, above)


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_starts_at_the_weight_and_hardens_to_nearest(fmt) -> None:
    """The gate's initial value puts the soft weight on the original; hard, it is a nearest level."""
    weight = dense(fmt)
    rounding = rule(weight, fmt)
    assert torch.allclose(rounding(weight), weight, rtol=1e-5, atol=1e-5 * float(weight.abs().max()))
    hard = levels(fmt, rounding.hard_codes())
    y = weight / scale_of(weight, fmt)
    nearest = parse(fmt).round(y)
    assert torch.allclose((hard - y).abs(), (nearest - y).abs(), rtol=1e-4, atol=1e-4)


@given(
    st.sampled_from(FORMATS),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=8, max_size=8),
    st.lists(st.floats(-50, 50, width=32), min_size=8, max_size=8),
)
@settings(max_examples=150)
def test_whatever_is_learned_is_a_code(fmt, values, logits) -> None:
    weight = torch.tensor([values])
    for kind in RULES:
        rounding = rule(weight, fmt, kind, group=4)
        with torch.no_grad():
            slope = 1 if rounding.slope is None else rounding.slope
            rounding.alpha.copy_(torch.tensor([logits]) / slope)
        learned = levels(fmt, rounding.hard_codes())
        assert set(learned.flatten().tolist()) <= set(parse(fmt).lattice.tolist())
        assert torch.isfinite(rounding(weight)).all()
        assert 0 <= rounding.regularizer(20.0).item() <= 1 + 1e-6


def gradients(kind: type[AdaRound]) -> tuple[torch.Tensor, torch.Tensor, AdaRound]:
    """(dL/dalpha, dL/dw^) of a random linear loss."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rounding = rule(weight, "e2m1", kind, group=16)
    outer = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    (rounding(weight) * outer).sum().backward()
    assert rounding.alpha.grad is not None
    return rounding.alpha.grad, outer, rounding


def logit(rounding: AdaRound) -> torch.Tensor:
    """v."""
    return (rounding.alpha if rounding.slope is None else rounding.alpha * rounding.slope).detach()


def slope(rounding: AdaRound) -> torch.Tensor:
    """h'(v) of a gate that is not clipped."""
    sigmoid = torch.sigmoid(logit(rounding))
    return STRETCH * sigmoid * (1 - sigmoid)


def inside(rounding: AdaRound) -> torch.Tensor:
    """Weights that do not stand on a level, where the gate's clip makes the gradient a matter of the last bit."""
    return (rounding.gate().detach() - 0.5).abs() < 0.4999


def test_theorem_1_plain_gradients_carry_the_step() -> None:
    gradient, outer, rounding = gradients(AdaRound)
    expected = rounding.span * outer * slope(rounding)
    free = inside(rounding)
    assert free.float().mean() > 0.9
    assert torch.allclose(gradient[free], expected[free], atol=1e-6)


def test_theorem_2_scale_aware_gradients_do_not() -> None:
    gradient, outer, rounding = gradients(ScaleAwareAdaRound)
    free = inside(rounding)
    assert torch.allclose(gradient[free], (outer * slope(rounding))[free], atol=1e-6)


@pytest.mark.parametrize(("fmt", "same"), [("int4", True), ("e1m2", True), ("e2m1", False)])
def test_under_adam_weights_move_alike_only_if_scale_aware(fmt, same) -> None:
    """One Adam step moves every logit by lr (plain) or by lr / step (scale-aware): equal where steps are."""
    weight = torch.linspace(-0.99, 0.99, 64)[None]
    moves = []
    for kind in RULES:
        rounding = rule(weight, fmt, kind)
        optimizer = torch.optim.Adam([rounding.alpha], lr=rounding.learning_rate(1e-3), eps=1e-20)
        before = logit(rounding).clone()
        rounding(weight).sum().backward()
        optimizer.step()
        moves.append((logit(rounding) - before).abs())
    moved = (moves[0] > 0) & (moves[1] > 0)
    assert moved.sum() > 10
    assert torch.allclose(moves[0][moved], moves[1][moved], rtol=1e-2) is same


def test_half_precision_weights_round_in_float32() -> None:
    weight = torch.randn(4, 32).to(torch.bfloat16)
    rounding = rule(weight, "e2m1", ScaleAwareAdaRound, group=16)
    assert rounding(weight).dtype == torch.bfloat16
    assert rounding.alpha.dtype == torch.float32


@pytest.mark.parametrize("kind", RULES)
def test_gate_and_regularizer_differentiate_as_autograd_would(kind) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rounding = rule(weight, "e2m1", kind, group=16)
    outer = torch.randn(4, 32)

    def plain(alpha: torch.Tensor) -> torch.Tensor:
        v = alpha if rounding.slope is None else alpha * rounding.slope
        h = (STRETCH * torch.sigmoid(v) - SHIFT).clamp(0, 1)
        return ((rounding.base + rounding.span * h) * outer).sum() + (1 - (2 * h - 1).abs().pow(7.5)).mean()

    (expected,) = torch.autograd.grad(plain(rounding.alpha), rounding.alpha)
    (got,) = torch.autograd.grad((rounding(weight) * outer).sum() + rounding.regularizer(7.5), rounding.alpha)
    free = inside(rounding)
    assert torch.allclose(got[free], expected[free], rtol=1e-4, atol=1e-6)
    closed = logit(rounding).clone().fill_(9.0)
    with torch.no_grad():
        rounding.alpha.copy_(closed if rounding.slope is None else closed / rounding.slope)
    assert not torch.autograd.grad((rounding(weight) * outer).sum() + rounding.regularizer(7.5), rounding.alpha)[
        0
    ].any()


@pytest.mark.parametrize("kind", RULES)
def test_compiled_gates_have_the_same_gradient(kind) -> None:
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    rounding = rule(weight, "e2m1", kind, group=16)
    outer = torch.randn(4, 32)
    (expected,) = torch.autograd.grad(rounding(weight), rounding.alpha, outer)
    compiled = torch.compile(rounding, backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(compiled(weight), rounding.alpha, outer)
    assert expected.any()
    assert torch.equal(got, expected)


def test_learning_alpha_is_learning_logits_at_a_rate_per_weight() -> None:
    """Adam does not see a gradient's size: alpha at lr is v at lr / (S s)."""
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    scaled, plain = rule(weight, "e2m1", ScaleAwareAdaRound, 16), rule(weight, "e2m1", AdaRound, 16)
    lr = scaled.learning_rate(1e-2)
    rates = (lr * scaled.slope).flatten()
    pieces = [torch.nn.Parameter(v.clone()) for v in plain.alpha.detach().flatten()]
    first = torch.optim.Adam([scaled.alpha], lr=lr, eps=1e-30)
    second = torch.optim.Adam([{"params": [p], "lr": float(r)} for p, r in zip(pieces, rates, strict=True)], eps=1e-30)
    target = torch.randn(4, 32)
    for _ in range(5):
        first.zero_grad()
        second.zero_grad()
        ((scaled(weight) - target) ** 2).sum().backward()
        v = torch.stack(list(pieces)).reshape(4, 32)
        h = (STRETCH * torch.sigmoid(v) - SHIFT).clamp(0, 1)
        ((plain.base + plain.span * h - target) ** 2).sum().backward()
        first.step()
        second.step()
    free = inside(plain)
    assert torch.allclose(logit(scaled)[free], torch.stack(list(pieces)).reshape(4, 32)[free], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_gate_that_starts_from_settled_codes_hardens_to_them_and_is_still_open(fmt, kind) -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    rounding = rule(weight, fmt, kind, group=16)
    settled = torch.where(
        torch.rand(8, 32, generator=torch.Generator().manual_seed(1)) < 0.5, rounding.low, rounding.up
    )
    movable = inside(rounding) & (rounding.low != rounding.up)
    rounding.start_from(settled)
    assert torch.equal(rounding.hard_codes(), settled)
    assert (inside(rounding) | ~movable).all()
    (gradient,) = torch.autograd.grad(rounding(weight).sum(), rounding.alpha)
    assert gradient[movable].all()
