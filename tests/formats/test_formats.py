"""Number formats: every code of every format, against oracles that share no code with the package."""

import math
from functools import cache

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

from fp4dit_ao.formats import FloatFormat, pack, unpack


def every_format() -> list[FloatFormat]:
    """All that fit a byte, from two bits to eight, and those with a code set aside for NaN."""
    found = []
    for e in range(8):
        for m in range(8):
            for nan in (False, True):
                try:
                    found.append(FloatFormat(e, m, nan))
                except ValueError:
                    continue
    return found


FORMATS = every_format()
each_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def all_codes(fmt: FloatFormat) -> Tensor:
    """Codes of both signs, without those set aside for NaN."""
    positive = torch.arange(fmt.max_code + 1)
    return torch.cat([positive, positive + 2 ** (fmt.bits - 1)]).to(torch.uint8)


@cache
def levels(fmt: FloatFormat) -> np.ndarray:
    """float64, ascending: the values of the non-negative codes, from the formula of an IEEE-like format."""
    code = np.arange(2 ** (fmt.bits - 1) - fmt.nan)
    exponent, mantissa = code >> fmt.mantissa_bits, code & (2**fmt.mantissa_bits - 1)
    implicit = np.where(exponent > 0, 1.0, 0.0)
    value = 2.0 ** np.maximum(exponent, 1) * (implicit + mantissa / 2.0**fmt.mantissa_bits)
    return value * 2.0 ** (fmt.mantissa_bits - 1)


def nearest_code(fmt: FloatFormat, y: np.ndarray) -> np.ndarray:
    """Brute force in float64: the code of the nearest level, at the exact middle the even one, NaN to 0."""
    grid = levels(fmt)
    with np.errstate(invalid="ignore"):  # signalling NaN
        wide = y.astype(np.float64)
    magnitude = np.minimum(np.abs(np.nan_to_num(wide, nan=0.0, posinf=1e300, neginf=-1e300)), grid[-1])
    above = np.minimum(np.searchsorted(grid, magnitude), len(grid) - 1)
    below = np.maximum(above - 1, 0)
    up, down = grid[above] - magnitude, magnitude - grid[below]
    code = np.where(up < down, above, np.where(down < up, below, above + above % 2 * (below - above)))
    return (code + (np.signbit(y) & ~np.isnan(y)) * 2 ** (fmt.bits - 1)).astype(np.uint8)


def critical_points(fmt: FloatFormat) -> np.ndarray:
    """float32: every level and every middle between levels, one float below and above each, and what lies outside."""
    grid = levels(fmt)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [grid[-1] * 1.5, 3e38, 1e-38, 1e-45]]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return np.concatenate([points, -points, np.float32([np.inf, -np.inf, np.nan])])


# --- lattices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("e2m1", [0, 1, 2, 3, 4, 6, 8, 12]),
        ("e3m0", [0, 1, 2, 4, 8, 16, 32, 64]),
        ("e1m2", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("int4", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("e2m0", [0, 1, 2, 4]),
        ("int2", [0, 1]),
    ],
)
def test_lattices_written_out(name: str, expected: list[int]) -> None:
    lattice = FloatFormat.parse(name).lattice
    assert lattice.dtype == torch.int64
    assert lattice.tolist() == [-level for level in expected[:0:-1]] + expected


@pytest.mark.parametrize(
    ("name", "largest"), [("e2m3", 60), ("e3m2", 448), ("e3m4", 1984), ("int8", 127), ("e4m3fn", 229376)]
)
def test_largest_levels(name: str, largest: int) -> None:
    assert FloatFormat.parse(name).lattice_max == largest


def test_which_formats_run_on_int8_units() -> None:
    fit = {str(fmt) for fmt in FORMATS if fmt.fits_int8 and fmt.bits in (4, 6)}
    assert fit == {"e0m3", "e1m2", "e2m1", "e2m1fn", "e1m2fn", "e3m0", "e0m5", "e1m4", "e1m4fn", "e2m3", "e2m3fn"}


@each_format
def test_decode_every_code(fmt: FloatFormat) -> None:
    decoded = fmt.decode(all_codes(fmt))
    assert decoded.dtype == torch.float32
    expected = np.concatenate([levels(fmt), -levels(fmt)])
    assert np.array_equal(decoded.numpy().astype(np.float64), expected)
    assert [fmt.level(code) for code in all_codes(fmt).tolist()] == expected.astype(object).tolist()
    assert fmt.lattice.tolist() == sorted(set(map(int, expected)))
    assert fmt.lattice_max == fmt.lattice.max() == levels(fmt)[-1]


@each_format
def test_encode_inverts_decode(fmt: FloatFormat) -> None:
    codes = all_codes(fmt)
    assert torch.equal(fmt.encode(fmt.decode(codes)), codes)


@each_format
def test_magnitudes_sort_like_codes_and_signs_mirror(fmt: FloatFormat) -> None:
    positive, negative = fmt.decode(all_codes(fmt)).chunk(2)
    assert (positive.diff() > 0).all()
    assert torch.equal(negative, -positive)
    assert torch.equal(fmt.lattice, -fmt.lattice.flip(0))


# --- rounding --------------------------------------------------------------------------------------------------------


@each_format
def test_encode_at_every_level_and_every_middle(fmt: FloatFormat) -> None:
    y = critical_points(fmt)
    assert np.array_equal(fmt.encode(torch.from_numpy(y)).numpy(), nearest_code(fmt, y))


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_encode_every_16_bit_float(fmt: FloatFormat, dtype: torch.dtype) -> None:
    y = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.int16).view(dtype)
    assert np.array_equal(fmt.encode(y).numpy(), nearest_code(fmt, y.float().numpy()))


@each_format
def test_round_is_decode_of_encode(fmt: FloatFormat) -> None:
    y = torch.from_numpy(critical_points(fmt))
    assert torch.equal(fmt.round(y), fmt.decode(fmt.encode(y)))


@settings(derandomize=True, max_examples=300)
@given(st.sampled_from(FORMATS), st.lists(st.floats(width=32), min_size=1, max_size=50), st.integers(-40, 64))
def test_wild_floats(fmt: FloatFormat, values: list[float], exponent: int) -> None:
    """Any float32 at all, and the same ones moved to where the levels are."""
    with np.errstate(over="ignore", under="ignore"):
        wild = np.array(values, dtype=np.float32)
        y = np.concatenate([wild, np.ldexp(np.frexp(wild)[0], exponent).astype(np.float32)])
    codes = fmt.encode(torch.from_numpy(y))
    assert np.array_equal(codes.numpy(), nearest_code(fmt, y))
    rounded = fmt.round(torch.from_numpy(y))
    assert torch.equal(rounded, fmt.decode(codes))
    assert torch.isfinite(rounded).all()
    assert torch.equal(fmt.round(torch.from_numpy(-y)), -rounded)
    in_order = torch.from_numpy(np.sort(y[~np.isnan(y)]))
    assert (fmt.round(in_order).diff() >= 0).all()


@pytest.mark.parametrize("name", ["e2m1", "e3m0", "e2m3", "int4"])
def test_shapes_and_layouts(name: str) -> None:
    fmt = FloatFormat.parse(name)
    y = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.equal(fmt.encode(y.T), fmt.encode(y).T)
    assert torch.equal(fmt.encode(y[:, ::2]), fmt.encode(y)[:, ::2])
    assert fmt.encode(y[0, 0]).shape == fmt.decode(fmt.encode(y[0, 0])).shape == ()
    assert fmt.encode(y[:0]).shape == fmt.decode(fmt.encode(y[:0])).shape == (0, 5)
    assert fmt.encode(y.double()).equal(fmt.encode(y))


def test_ties_without_mantissa_bits_go_to_the_even_code() -> None:
    """IEEE's rule on codes, as in torchao: 3 lies between 2 (code 2) and 4 (code 3), 6 between 4 and 8 (code 4)."""
    y = torch.tensor([0.5, 1.5, 3, 6, 12, 24, 48])
    assert FloatFormat.parse("e3m0").round(torch.cat([y, -y])).tolist() == [
        0,
        2,
        2,
        8,
        8,
        32,
        32,
        0,
        -2,
        -2,
        -8,
        -8,
        -32,
        -32,
    ]


# --- independent implementations -------------------------------------------------------------------------------------


def ieee_step(fmt: FloatFormat) -> float:
    """The value of one lattice step in a format with IEEE's exponent bias, 2^(E-1) - 1."""
    return 2.0 ** (1 - (2 ** (fmt.exponent_bits - 1) - 1) - fmt.mantissa_bits)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e3m4", ml_dtypes.float8_e3m4),
        ("e4m3", ml_dtypes.float8_e4m3),
        ("e5m2", ml_dtypes.float8_e5m2),
    ],
)
def test_ml_dtypes(name: str, dtype: type) -> None:
    """Code by code and tie by tie; where the other format ends in infinities, up to its largest finite value."""
    fmt = FloatFormat.parse(name)
    codes = all_codes(fmt).numpy()
    values = codes.view(dtype).astype(np.float32)
    finite = np.isfinite(values)
    assert finite.sum() >= len(codes) - 2 ** (fmt.mantissa_bits + 1)
    assert np.array_equal(fmt.decode(torch.from_numpy(codes)).numpy()[finite] * ieee_step(fmt), values[finite])

    y = critical_points(fmt)
    y = y[np.abs(y) <= values[finite].max() / ieee_step(fmt)]
    assert np.array_equal(fmt.encode(torch.from_numpy(y)).numpy(), (y * ieee_step(fmt)).astype(dtype).view(np.uint8))


@pytest.mark.parametrize(("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_torch_float8(name: str, dtype: torch.dtype) -> None:
    fmt = FloatFormat.parse(name)
    codes = all_codes(fmt)
    values = codes.view(dtype).float()
    finite = torch.isfinite(values)
    assert torch.equal(fmt.decode(codes)[finite] * ieee_step(fmt), values[finite])

    y = torch.from_numpy(critical_points(fmt))
    y = y[y.abs() <= values[finite].max() / ieee_step(fmt)]
    assert torch.equal(fmt.encode(y), (y * ieee_step(fmt)).to(dtype).view(torch.uint8))


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.nan and 2 <= f.exponent_bits <= 5], ids=str)
def test_torchao_custom_fp_utils(fmt: FloatFormat) -> None:
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    codes = all_codes(fmt)
    assert torch.equal(fmt.decode(codes) * ieee_step(fmt), _floatx_unpacked_to_f32(codes, e, m))

    y = torch.from_numpy(critical_points(fmt))
    y = y[torch.isfinite(y) & (y.abs() < 2.0**100)]
    assert torch.equal(fmt.encode(y), _f32_to_floatx_unpacked(y * ieee_step(fmt), e, m))


# --- the paper's formulas --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [f for f in FORMATS if not f.nan and f.exponent_bits], ids=str)
@pytest.mark.parametrize("maxval", [1.0, 0.0371, 6.0, 812.5])
def test_the_papers_bias_and_element_scale(fmt: FloatFormat, maxval: float) -> None:
    """b = 2^E - log2(maxval) + log2(2 - 2^-M) - 1, step = 2^(1-b-M), s(x) = 2^(max(floor(log2|x| + b), 1) - M - b)."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    b = 2**e - math.log2(maxval) + math.log2(2 - 2.0**-m) - 1
    assert fmt.exponent_bias(maxval) == pytest.approx(b, rel=1e-12)
    step = 2.0 ** (1 - b - m)
    assert step == pytest.approx(maxval / fmt.lattice_max, rel=1e-12)

    grid = levels(fmt)
    x = np.concatenate([grid[:-1] + fraction * np.diff(grid) for fraction in (0.25, 0.75)]) * step
    s = 2.0 ** (np.maximum(np.floor(np.log2(x) + b), 1) - m - b)
    assert np.allclose(fmt.element_step(torch.from_numpy(x / step)).numpy() * step, s, rtol=1e-6)
    assert np.allclose(fmt.round(torch.from_numpy(x / step)).numpy() * step, np.round(x / s) * s, rtol=1e-6)


def test_the_bias_of_hardware_formats() -> None:
    assert FloatFormat.parse("e4m3fn").exponent_bias(448) == 7
    assert FloatFormat.parse("e2m1").exponent_bias(6) == 1
    assert FloatFormat.parse("e5m2").exponent_bias(7 * 2.0**14) == 15


@each_format
def test_element_step_is_the_distance_to_the_next_level(fmt: FloatFormat) -> None:
    grid = levels(fmt)
    y = torch.from_numpy(grid).float()
    assert np.array_equal(fmt.element_step(y[:-1]).numpy(), np.diff(grid).astype(np.float32))
    assert torch.equal(fmt.element_step(-y), fmt.element_step(y))


# --- names -----------------------------------------------------------------------------------------------------------


@each_format
def test_names_round_trip(fmt: FloatFormat) -> None:
    assert FloatFormat.parse(str(fmt)) == fmt
    assert hash(FloatFormat.parse(str(fmt))) == hash(fmt)
    assert 2 <= fmt.bits <= 8


def test_integers_by_their_usual_name() -> None:
    assert [str(FloatFormat.parse(f"int{bits}")) for bits in (2, 4, 6, 8)] == ["e0m1", "e0m3", "e0m5", "e0m7"]


@pytest.mark.parametrize(
    "name", ["", "fp4", "E2M1", "e2m1 ", "e2m1\n", "e2", "m1", "e-1m3", "int", "uint4", "e2m1fnuz", None, 4, ["e2m1"]]
)
def test_unknown_names_are_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"unknown number format .*; write 'e2m1' for 2 exponent and 1 mantissa bits"):
        FloatFormat.parse(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("e0m0", "has 1 bits; a format has 2 to 8"),
        ("int1", "has 1 bits; a format has 2 to 8"),
        ("e4m4", "has 9 bits; a format has 2 to 8"),
        ("int9", "has 9 bits; a format has 2 to 8"),
        ("e6m1", "more than 63 bits of integers; use fewer exponent bits"),
        ("e7m0", "more than 63 bits of integers; use fewer exponent bits"),
        ("e3m0fn", "only formats with exponent and mantissa bits"),
        ("e0m3fn", "only formats with exponent and mantissa bits"),
    ],
)
def test_formats_that_cannot_be(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FloatFormat.parse(name)


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(2,), (3, 8), (2, 3, 4), (0, 6), (5, 0)])
def test_pack_stores_two_codes_a_byte(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], shape[-1] // 2) and packed.is_contiguous()
    assert torch.equal(unpack(packed, bits), codes)


def test_every_byte_and_its_order() -> None:
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(pack(unpack(every, 4), 4), every)
    assert pack(torch.tensor([1, 15], dtype=torch.uint8), 4).tolist() == [0xF1]


def test_pack_takes_any_layout() -> None:
    codes = torch.randint(16, (8, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for view in (codes.T, codes[:, ::3], codes[::2], codes[:1].expand(4, 6)):
        assert torch.equal(unpack(pack(view, 4), 4), view)


@pytest.mark.parametrize("bits", [5, 6, 8])
def test_wider_codes_keep_a_byte(bits: int) -> None:
    codes = torch.arange(2**bits, dtype=torch.int32).to(torch.uint8)[:-1]
    assert torch.equal(pack(codes, bits), codes)
    assert torch.equal(unpack(codes, bits), codes)


def test_an_odd_row_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot pack 7 codes of 4 bits a row two to a byte; the count must be even"):
        pack(torch.zeros(2, 7, dtype=torch.uint8), 4)


@pytest.mark.parametrize("fmt", ["e2m1", "e1m2", "e3m0", "e2m3", "e3m2", "e3m4", "e4m3fn", "int4", "int6"])
def test_compiled_rounding_is_rounding(fmt: str) -> None:
    format_ = FloatFormat.parse(fmt)
    lattice = format_.lattice.float()
    middles = (lattice[1:] + lattice[:-1]) / 2
    points = torch.cat([lattice, middles, torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1e30, 1e-40])])
    near = torch.cat([points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(-torch.inf))])
    torch.compiler.reset()
    compiled = torch.compile(format_.round, dynamic=False, fullgraph=True)  # a format's numbers are constants
    assert torch.equal(compiled(near), format_.decode(format_.encode(near)))
