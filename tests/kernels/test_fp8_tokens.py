"""Tokens for FP8 products: one conversion to E4M3 rounds as the formats that are E4M3's lowest binades do."""

import pytest
import torch
from torch import Tensor

from fp4dit_ao.formats import FloatFormat, parse
from fp4dit_ao.formats.float_format import rounded_by_e4m3
from fp4dit_ao.formats.number_format import E4M3_STEP
from fp4dit_ao.kernels.token_quantization import add_digits, digits, fits_fp8, fp8_tokens, quantize_tokens

ROUNDED = [name for e in range(8) for m in range(8) if (name := f"e{e}m{m}") in ("e1m3", "e2m3", "e3m3")] + ["e4m3fn"]
FITTING = [*ROUNDED, "e2m1", "e2m2", "e3m0", "e1m2", "int4"]


def nearest(fmt: FloatFormat, y: Tensor) -> Tensor:
    """Levels nearest to ``y``, ties to even codes, by going through all of them."""
    levels = fmt.lattice.double()
    distance = (y.double()[:, None] - levels).abs()
    least = distance.min(1, keepdim=True).values
    codes = torch.tensor([fmt.encode(level.float().reshape(1)).item() for level in levels])
    odd = (codes & 1).expand_as(distance)
    return levels[torch.where(distance == least, odd, 2).argmin(1)]


def test_the_formats_that_e4m3_rounds() -> None:
    """Those with three bits of mantissa and at most E4M3's exponents; E4M3 itself only if 448 is its largest number."""
    found = []
    for e in range(7):
        for m in range(7 - e):
            if e + m and parse(f"e{e}m{m}").is_rounded_by_e4m3:
                found.append(f"e{e}m{m}")
    assert found == ["e1m3", "e2m3", "e3m3"]
    assert parse("e4m3fn").is_rounded_by_e4m3
    assert not parse("e4m3").is_rounded_by_e4m3


@pytest.mark.parametrize("name", ROUNDED)
def test_conversion_to_e4m3_rounds_as_the_format_does(name: str) -> None:
    """Every level, every middle between two, and the float32 numbers beside each."""
    fmt = parse(name)
    assert isinstance(fmt, FloatFormat)
    levels = fmt.lattice.float()
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
    wild = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = torch.cat(
        [points, points.nextafter(torch.tensor(1e9)), points.nextafter(torch.tensor(-1e9)), wild * levels[-1]]
    )
    y = y.clamp(levels[0], levels[-1])
    expected = nearest(fmt, y) if len(levels) < 300 else fmt.round(y).double()
    assert torch.equal(rounded_by_e4m3(y).double(), expected)
    assert torch.equal(fmt.round(y).double(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FITTING)
def test_they_stand_for_the_same_values(name: str, dtype: torch.dtype) -> None:
    """Levels times scales are those of int8 tokens, to the bit: units differ by a power of two."""
    assert fits_fp8(parse(name))
    torch.manual_seed(0)
    x = torch.randn(3, 5, 96).to(dtype) * torch.logspace(-6, 4, 15).reshape(3, 5, 1).to(dtype)
    x[1, 2] = 0
    levels, scale = fp8_tokens(x, name)
    assert (levels.dtype, levels.shape, scale.dtype, scale.shape) == (
        torch.float8_e4m3fn,
        (15, 96),
        torch.float32,
        (15, 1),
    )
    tokens, token_scale = quantize_tokens(x, name)
    exact = add_digits(tokens.float(), digits(parse(name)))
    unit = E4M3_STEP if parse(name).is_rounded_by_e4m3 else 1.0
    assert torch.equal(levels.float(), exact * unit)
    assert torch.equal(scale * unit, token_scale)


@pytest.mark.parametrize("name", ["e2m3", "e2m2"])
def test_what_is_no_number_stays_visible(name: str) -> None:
    x = torch.ones(3, 32)
    x[0, 3], x[1, 5] = torch.nan, torch.inf
    levels, scale = fp8_tokens(x, name)
    values = levels.float() * scale
    assert values[0].isnan().any()
    assert not values[1].isfinite().all()
    assert torch.equal(values[2], torch.ones(32))


@pytest.mark.parametrize("name", ["int8", "e3m4", "e4m3", "e2m4"])
def test_formats_that_it_does_not_hold(name: str) -> None:
    assert not fits_fp8(parse(name))


def test_linears_that_read_the_same_value_share_one_quantization() -> None:
    def twice(x: Tensor) -> Tensor:
        return sum(levels.float() for levels, _ in (fp8_tokens(x, "e2m3"), fp8_tokens(x, "e2m3")))

    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    from torch._dynamo.backends.common import aot_autograd

    torch.compile(twice, backend=aot_autograd(fw_compiler=backend))(torch.randn(4, 32))
    conversions = [node for node in graphs[0].graph.nodes if node.kwargs.get("dtype") == torch.float8_e4m3fn]
    assert len(conversions) == 1
