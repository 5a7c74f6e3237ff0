"""Objectives: free of units, zero where nothing differs, and means over rows."""

import pytest
import torch

from fp4dit_ao.passes.reconstruction.objectives import OBJECTIVES


def values() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(6, 5, 8, generator=generator)
    return full + 0.1 * torch.randn(6, 5, 8, generator=generator), full


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_contract(name) -> None:
    objective = OBJECTIVES[name]
    quantized, full = values()
    power = float(objective.power(full))
    error = objective.error(quantized, full, power)
    assert objective.error(full, full, power) == 0
    scaled = objective.error(7 * quantized, 7 * full, float(objective.power(7 * full)))
    assert float(scaled) == pytest.approx(float(error), rel=1e-5)
    halves = [objective.error(quantized[i : i + 3], full[i : i + 3], power) for i in (0, 3)]
    assert float(sum(halves) / 2) == pytest.approx(float(error), rel=1e-5)
    assert float(sum(objective.power(full[i : i + 3]) for i in (0, 3)) / 2) == pytest.approx(power, rel=1e-5)
    quantized.requires_grad_()
    (gradient,) = torch.autograd.grad(objective.error(quantized, full, power), quantized)
    assert gradient.isfinite().all()
    assert gradient.any()


def test_mean_squared_error_is_relative_to_the_power() -> None:
    quantized, full = values()
    expected = (quantized - full).double().square().mean() / full.double().square().mean()
    objective = OBJECTIVES["mse"]
    assert float(objective.error(quantized, full, float(objective.power(full)))) == pytest.approx(
        float(expected), rel=1e-5
    )
