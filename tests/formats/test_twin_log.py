"""Twin log formats: levels by NumPy from the paper's quantizer, and how they differ."""

import numpy as np
import pytest
import torch

from fp4dit_ao.config import RECIPES
from fp4dit_ao.formats import parse
from fp4dit_ao.formats.twin_log import ETAS


@pytest.mark.parametrize("name", ETAS)
def test_weights_are_rounded_in_the_logarithm(name: str) -> None:
    """``2^u - eta`` with u an integer number of steps above ``log2(eta)``, 7 steps for one sign and 8 for the other."""
    fmt, eta = parse(name), ETAS[name]
    assert len(fmt.lattice) == 16
    for sign, steps in ((1, 7), (-1, 8)):
        step = (np.log2(1 + eta) - np.log2(eta)) / steps
        wanted = {round(127 * (2 ** (np.log2(eta) + n * step) - eta)) for n in range(steps + 1)}
        assert {int(level) * sign for level in fmt.lattice if level * sign >= 0} == wanted
    assert fmt.lattice_max == 127


def test_a_small_eta_has_more_levels_near_zero() -> None:
    inside = [int((parse(name).lattice.abs() < 32).sum()) for name in ETAS]
    assert inside == sorted(inside, reverse=True)
    assert inside[0] > inside[-1]
    gaps = parse("twin_log_100").lattice.diff()
    assert int(gaps.max()) <= 3 * int(gaps.min()), "nearly even"
    assert int(parse("twin_log_2").lattice.diff().max()) > 20


def test_the_recipe_lets_each_layer_choose() -> None:
    config = RECIPES["w4a4_twin_log"]()
    assert set(config.weight_candidates) == set(ETAS)
    heavy = torch.randn(4096, generator=torch.Generator().manual_seed(0)) ** 3
    even = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def error(x: torch.Tensor, name: str) -> float:
        scaled = x / x.abs().max() * 127
        return float((parse(name).round(scaled) - scaled).square().sum())

    assert min(ETAS, key=lambda name: error(even, name)) == "twin_log_100"
    assert min(ETAS, key=lambda name: error(heavy, name)) != "twin_log_100"
