"""Codebooks: formats whose levels follow no formula, every code and every 16-bit float against brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4dit_ao.formats import CODEBOOKS, CodebookFormat, FloatFormat, parse
from fp4dit_ao.observers.scale_search import mse, squared_error
from fp4dit_ao.ops import choose_scale

NARROW = CodebookFormat("narrow", (-3, 0, 1, 90))
FORMATS = [*CODEBOOKS.values(), NARROW]
each_codebook = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def nearest_code(fmt: CodebookFormat, y: np.ndarray) -> np.ndarray:
    """float64: the code of the nearest level, at the exact middle the even one, NaN as 0."""
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = np.nan_to_num(y.astype(np.float64), nan=0.0, posinf=1e300, neginf=-1e300)
    distance = np.abs(np.array(fmt.levels, dtype=np.float64) - np.clip(wide, -1e6, 1e6)[:, None])
    closest = distance == distance.min(1, keepdims=True)
    even = closest & (np.arange(len(fmt.levels)) % 2 == 0)
    return np.where(even.any(1), even.argmax(1), closest.argmax(1)).astype(np.uint8)


def test_nf4_is_quantiles_of_a_normal_distribution() -> None:
    """As arXiv 2305.14314 builds it: eight quantiles below zero, seven above besides zero, scaled to the largest."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    above = torch.special.ndtri(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64))[:-1]
    below = -torch.special.ndtri(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64))[:-1]
    levels = torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)]) / above.max()
    assert CODEBOOKS["nf4"].levels == tuple((levels * 127).round().int().tolist())


@each_codebook
def test_every_code(fmt: CodebookFormat) -> None:
    codes = torch.arange(len(fmt.levels), dtype=torch.uint8)
    decoded = fmt.decode(codes)
    assert decoded.dtype == torch.float32
    assert tuple(decoded.tolist()) == fmt.levels == tuple(fmt.lattice.tolist()) == tuple(map(fmt.level, codes.tolist()))
    assert torch.equal(fmt.encode(decoded), codes)
    assert fmt.lattice_max == max(map(abs, fmt.levels))
    assert fmt.fits_int8


@each_codebook
def test_every_level_and_every_middle_and_the_floats_beside_them(fmt: CodebookFormat) -> None:
    levels = np.array(fmt.levels, dtype=np.float32)
    points = np.concatenate([levels, (levels[1:] + levels[:-1]) / 2, np.float32([1e-45, 3e38, np.inf, np.nan])])
    beside = [np.nextafter(points, np.float32(side)) for side in (np.inf, -np.inf)]
    y = np.concatenate([points, *beside, np.float32([-np.inf, -3e38, -0.0])])
    assert np.array_equal(fmt.encode(torch.from_numpy(y)).numpy(), nearest_code(fmt, y))


@each_codebook
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_float(fmt: CodebookFormat, dtype: torch.dtype) -> None:
    y = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.int16).view(dtype)
    assert np.array_equal(fmt.encode(y).numpy(), nearest_code(fmt, y.float().numpy()))


@settings(derandomize=True)
@given(
    st.sets(st.integers(-127, 127).filter(bool), min_size=15, max_size=15),
    st.lists(st.floats(width=32), min_size=1, max_size=50),
)
def test_any_sixteen_levels(levels: set[int], values: list[float]) -> None:
    fmt = CodebookFormat("any", tuple(sorted(levels | {0})))
    y = np.array(values, dtype=np.float32)
    assert np.array_equal(fmt.encode(torch.from_numpy(y)).numpy(), nearest_code(fmt, y))
    low, step = fmt.bracket(fmt.lattice.float())
    assert torch.equal(low, fmt.lattice.float())
    assert torch.equal((low + step)[:-1], fmt.lattice.float()[1:])


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3, 4)], ids=str)
def test_shapes_and_layouts(shape: tuple[int, ...]) -> None:
    fmt = parse("nf4")
    y = torch.randn(shape) * 60
    assert fmt.encode(y).shape == fmt.round(y).shape == shape
    if y.ndim > 1:
        assert torch.equal(fmt.round(y.mT), fmt.round(y).mT)


def test_compiled_rounding_is_rounding() -> None:
    fmt = parse("nf4")
    y = torch.randn(1000) * 60
    assert torch.equal(torch.compile(fmt.round, fullgraph=True)(y), fmt.round(y))


def test_names() -> None:
    assert {str(parse(name)) for name in CODEBOOKS} == set(CODEBOOKS)
    assert all(isinstance(parse(name), CodebookFormat) for name in CODEBOOKS)
    assert parse("e2m1") == FloatFormat(2, 1)
    with pytest.raises(ValueError, match=r"unknown number format 'nf3'; write .* a codebook's name: nf4"):
        parse("nf3")


@pytest.mark.parametrize("levels", [(), (0,), (-1, 0, 1), (0, 2, 1, 3), (-2, -1, 1, 2), tuple(range(512))], ids=str)
def test_levels_that_are_no_codebook(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a codebook has 2, 4, 8"):
        CodebookFormat("bad", levels)


def test_normal_weights_are_closest_to_nf4_and_closer_with_a_searched_scale() -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    block = [1, 128]

    def error(name: str, searched: bool) -> float:
        fmt = parse(name)
        scale = mse(weight, block, fmt, torch.float32) if searched else choose_scale(weight, block, name, torch.float32)
        return float(squared_error(weight, block, fmt, scale).sum())

    errors = {name: (error(name, False), error(name, True)) for name in ("nf4", "e2m1", "int4", "e3m0")}
    assert list(errors) == sorted(errors, key=lambda name: errors[name][0])
    assert all(searched < absmax for absmax, searched in errors.values())
    assert errors["nf4"][1] == min(searched for _, searched in errors.values())
