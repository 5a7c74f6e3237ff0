"""MinifloatTensor: storage, moving, state dicts, and its linear against float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fp4dit_ao import MinifloatTensor, kernels
from fp4dit_ao.formats import parse

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def make(
    fmt="e2m1", act_fmt="e2m3", shape=(48, 256), block=(1, 128), dtype=torch.float32, device="cpu", scale=torch.float32
):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    return MinifloatTensor.from_hp(weight, list(block), fmt, act_fmt, scale)


def test_four_bit_codes_take_half_a_byte() -> None:
    weight = make()
    assert weight.shape == (48, 256)
    assert weight.qdata.shape == (48, 128)
    assert weight.qdata.dtype == torch.uint8
    assert weight.scale.shape == (48, 2)


@pytest.mark.parametrize("fmt", ["e2m1", "e3m0", "e1m2", "int4", "e2m3", "e3m4", "e4m3fn", "nf4"])
def test_dequantize_is_the_nearest_level(fmt) -> None:
    weight = torch.randn(8, 256)
    tensor = MinifloatTensor.from_hp(weight, [1, 128], fmt)
    lattice = parse(fmt).lattice.double()
    step = tensor.scale.double().repeat_interleave(128, 1)
    nearest = (lattice - (weight.double() / step)[..., None]).abs().min(-1).values
    error = (tensor.dequantize().double() - weight.double()).abs() / step
    # the product level * scale is rounded once, to float32
    assert ((error - nearest).abs() <= 2e-7 * parse(fmt).lattice_max).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("fmt", "act_fmt"),
    [*itertools.product(["e2m1", "e3m0", "e1m2", "nf4"], ["e2m3", "e3m4", "int8", "e4m3fn", None]), ("e2m3", "e2m3")],
)
@pytest.mark.parametrize("block", [(1, 128), (1, -1), (-1, -1)])
def test_linear_against_float64(fmt, act_fmt, block, device) -> None:
    weight = make(fmt, act_fmt, block=block, device=device)
    bias = torch.randn(48, device=device)
    for shape in [(256,), (1, 256), (3, 5, 256), (0, 256)]:
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device)
        x_hat = x
        if act_fmt:
            scale = torch.ops.fp4dit_ao.choose_scale(x, [1] * (x.ndim - 1) + [-1], act_fmt, torch.float32)
            x_hat = parse(act_fmt).round(x / scale).double() * scale.double()
        w_hat = weight.dequantize(torch.float32).double()
        exact = F.linear(x_hat.double(), w_hat, bias.double())
        magnitude = F.linear(x_hat.double().abs(), w_hat.abs(), bias.double().abs())
        y = F.linear(x, weight, bias)
        assert y.shape == exact.shape
        assert ((y - exact).abs() <= 2e-6 * magnitude).all()


def test_which_pairs_run_on_int8() -> None:
    """Every recipe's: activations of 8 bits with two or three int8 digits a level."""
    for fmt, act_fmt in itertools.product(
        ["e2m1", "e3m0", "e1m2", "int4", "nf4"], ["e2m3", "int6", "int8", "e3m4", "e4m3fn"]
    ):
        assert kernels.pick(parse(fmt), parse(act_fmt), "cpu").name.startswith("int8")
    assert kernels.pick(parse("e3m2"), parse("e2m3"), "cpu").name == "float32, dequantized"
    assert kernels.pick(parse("e2m1"), parse("e5m2"), "cpu").name == "float32, dequantized"
    assert kernels.pick(parse("e2m1"), None, "cpu").name == "float32, dequantized"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_and_out(dtype) -> None:
    weight = make(dtype=dtype, scale=torch.float16)
    x = torch.randn(4, 256, dtype=dtype)
    y = F.linear(x, weight)
    assert y.dtype == dtype
    reference = F.linear(x.float(), weight.dequantize(torch.float32))
    assert (y.float() - reference).norm() / reference.norm() < 0.05  # six-bit inputs


def test_non_contiguous_and_transposed_input() -> None:
    weight, x = make(), torch.randn(256, 6).T
    assert torch.equal(F.linear(x, weight), F.linear(x.contiguous(), weight))


def test_prints_as_one_line() -> None:
    assert repr(make()) == (
        "MinifloatTensor(fmt=e2m1, act_fmt=e2m3, block_size=[1, 128], shape=(48, 256), scale=float32, "
        "dtype=torch.float32, device='cpu')"
    )
    assert "MinifloatTensor(fmt=e2m1" in repr(torch.nn.Parameter(make(), requires_grad=False))


def test_moving_keeps_codes() -> None:
    weight = make()
    half = weight.to(torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert half.scale.dtype == torch.float32
    assert torch.equal(half.qdata, weight.qdata)
    assert torch.equal(weight.detach().clone().qdata, weight.qdata)


def test_in_a_module_state_dict_and_back() -> None:
    layer = nn.Linear(256, 48)
    layer.weight = nn.Parameter(make(), requires_grad=False)
    other = nn.Linear(256, 48)
    other.load_state_dict(layer.state_dict(), assign=True)
    x = torch.randn(3, 256)
    assert torch.equal(other(x), layer(x))
    assert isinstance(other.weight, MinifloatTensor)


def test_compiles_without_a_break() -> None:
    layer = nn.Linear(256, 48)
    layer.weight = nn.Parameter(make(), requires_grad=False)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for rows in (2, 7, 33):
            x = torch.randn(rows, 256)
            assert torch.allclose(compiled(x), layer(x), rtol=1e-5, atol=1e-5)


def test_a_nan_token_stays_visible_and_alone() -> None:
    x = torch.randn(3, 256)
    x[1, 5] = float("nan")
    y = F.linear(x, make())
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
