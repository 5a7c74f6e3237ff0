"""Settings of reconstruction: what they refuse, and how AdaRoundConfig relates to ReconstructionConfig."""

import math
from dataclasses import fields, replace

import pytest

from fp4dit_ao import AdaRoundConfig, ReconstructionConfig


@pytest.mark.parametrize("kind", [AdaRoundConfig, ReconstructionConfig])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"iters": -1}, "iters=-1; it must be a whole number of at least 0"),
        ({"iters": 2.5}, "iters=2.5; it must be a whole number"),
        ({"batch_size": 0}, "batch_size=0; it must be a whole number of at least 1"),
        ({"warmup": 1.0}, "warmup=1.0; it must be at least 0 and less than 1"),
        ({"regularizer": -1}, "regularizer=-1; it must be at least 0"),
        ({"regularizer": math.nan}, "regularizer=nan; it must be at least 0"),
        ({"lr": 0.0}, "lr=0.0; it must be more than 0"),
        ({"lr": math.inf}, "lr=inf; it must be more than 0"),
        ({"relative_lr": -1.0}, "relative_lr=-1.0; it must be more than 0"),
        ({"lr": 1e-4, "relative_lr": 5e-3}, "lr=0.0001; relative_lr=0.005 says the same in other units; give one of the two"),
        ({"beta": (1,)}, r"beta=\(1,\); it must be two numbers"),
        ({"beta": ()}, r"beta=\(\); it must be two numbers"),
        ({"beta": 20.0}, r"beta=20.0; it must be two numbers"),
        ({"beta": (20, 8, 2)}, r"beta=\(20, 8, 2\); it must be two numbers"),
        ({"beta": (20.0, 1.0)}, r"each more than 1"),
        ({"beta": (math.nan, 2.0)}, r"each more than 1"),
        ({"beta": (math.inf, 2.0)}, r"each more than 1"),
        ({"patience": 0}, "patience=0; it must be a whole number of at least 1, or None for all steps"),
        ({"patience": 2.5}, "patience=2.5; it must be a whole number"),
        ({"beta": ("20", "2")}, r"it must be two numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_are_refused(kind, bad, message) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: .*{message}"):
        kind(**bad)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"rounding": None}, "rounding=None; it must be the name of a registered method"),
        ({"window": 0}, "window=0; it must be a whole number of at least 1"),
        ({"overlap": -1}, "overlap=-1; it must be a whole number of at least 0"),
        ({"window": 2, "overlap": 2}, "overlap=2; it must be less than window=2, or windows would not advance"),
    ],
)
def test_bad_methods_and_windows_are_refused(bad, message) -> None:
    with pytest.raises(ValueError, match=message):
        ReconstructionConfig(**bad)


def test_the_smallest_beta_that_is_legal_has_a_gradient_at_the_corner() -> None:
    """At exponent 1 the penalty has no derivative at a half-open gate; above it has, and it is 0."""
    import torch

    from fp4dit_ao.passes.reconstruction.rounding.adaround import _Penalty

    for beta, finite in ((1.0, False), (math.nextafter(1.0, 2.0), True), (1.01, True)):
        gate = torch.full((1, 1), 0.5, requires_grad=True)
        (gradient,) = torch.autograd.grad(_Penalty.apply(gate, beta), gate)
        assert bool(torch.isfinite(gradient).all()) is finite
    assert ReconstructionConfig(beta=(2, 1.01)).beta == (2, 1.01)


def test_a_list_of_exponents_becomes_a_tuple() -> None:
    assert ReconstructionConfig(beta=[20.0, 2.0]) == ReconstructionConfig()


def test_adaround_config_is_a_reconstruction_config_with_fixed_methods() -> None:
    given = {"iters": 7, "batch_size": 3, "lr": 1e-3, "regularizer": 0.5, "beta": (9.0, 3.0), "warmup": 0.1, "seed": 4}
    for scale_aware, rounding in ((True, "scale_aware"), (False, "adaround")):
        config = AdaRoundConfig(**given, scale_aware=scale_aware)
        same = ReconstructionConfig(rounding, "mse", "block", **given)
        assert all(getattr(config, f.name) == getattr(same, f.name) for f in fields(ReconstructionConfig))
        assert replace(config, iters=8).rounding == rounding
    assert replace(AdaRoundConfig(), scale_aware=False).rounding == "adaround"
    with pytest.raises(TypeError):
        AdaRoundConfig(rounding="gptq")


def test_the_papers_defaults() -> None:
    config = AdaRoundConfig()
    assert (config.iters, config.batch_size, config.lr, config.relative_lr) == (2500, 16, None, None)
    assert (config.scale_aware, config.beta, config.warmup, config.regularizer) == (True, (20.0, 2.0), 0.2, 1.0)
    assert AdaRoundConfig(2500, 16, None, 5e-3).relative_lr == 5e-3
    assert (config.beta_at(0), config.beta_at(0.5), config.beta_at(1)) == (20.0, 11.0, 2.0)
    assert (AdaRoundConfig(iters=100).step_in_logits, config.step_in_logits) == (0.04, 5e-3)
