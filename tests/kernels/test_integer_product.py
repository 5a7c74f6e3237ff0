"""The exact int8 product: its numbers on this machine, and that CUDA's operator takes what it is given."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao import MinifloatTensor, _compat
from fp4dit_ao.kernels import level_linear
from fp4dit_ao.kernels.cuda import int8_linear as triton_units
from fp4dit_ao.kernels.integer_product import integer_product
from fp4dit_ao.tensors.levels import LevelTensor
from tests.cuda_rules import GPU, CudaRules, on_gpu

pytestmark = pytest.mark.usefixtures("copies")
SIZES = [
    (0, 5, 8), (1, 1, 1), (1, 70, 256), (16, 8, 8), (17, 8, 8), (18, 7, 9), (33, 16, 12), (5, 0, 8), (3, 4, 1024), (3, 4, 1025),
]  # fmt: skip


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Tensor.contiguous`` asks for a guard of the device, which PyTorch built for CPUs has not."""
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))


def int8(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)


@pytest.mark.parametrize(("rows", "features", "depth"), SIZES)
def test_it_is_the_product(rows: int, features: int, depth: int) -> None:
    tokens, levels = int8(rows, depth), int8(features, depth)
    y = integer_product(tokens, levels)
    assert y.dtype == torch.int32
    assert torch.equal(y.long(), tokens.long() @ levels.long().T)


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("depth", [1024, 1025, 3000])
def test_no_sum_is_rounded(depth: int, autocast: bool, instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest sums, odd ones next to them, and random ones; with the CPU's int8 instructions and without."""
    monkeypatch.setattr(_compat, "cpu_multiplies_int8", lambda: instructions)
    tokens, levels = int8(5, depth), int8(4, depth).flip(1)
    tokens[:3], levels[:2] = -128, -128
    tokens[1, -1], tokens[2, ::2] = -127, 127
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = integer_product(tokens, levels)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), tokens.long() @ levels.long().T)


@pytest.mark.parametrize(("rows", "features", "depth"), SIZES)
def test_cuda_takes_every_size(rows: int, features: int, depth: int) -> None:
    tokens, levels = on_gpu(int8(rows, depth), int8(features, depth))
    with GPU, CudaRules() as rules:
        assert integer_product(tokens, levels).shape == (rows, features)
    assert (torch.ops.aten._int_mm in rules.seen) == bool(rows and features)


def test_padding_adds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that CUDA's tensors go, with this machine's product."""
    monkeypatch.setattr(Tensor, "is_cuda", True)
    for rows, features, depth in SIZES:
        tokens, levels = int8(rows, depth), int8(features, depth)
        assert torch.equal(integer_product(tokens, levels).long(), tokens.long() @ levels.long().T)


def test_the_rules_see_a_product_that_cuda_refuses() -> None:
    for rows, features, depth in [(16, 8, 8), (17, 70, 8), (17, 8, 12)]:
        tokens, levels = on_gpu(int8(rows, depth), int8(features, depth))
        with pytest.raises(AssertionError, match="on CUDA"), GPU, CudaRules():
            torch._int_mm(tokens, levels.T)


@pytest.mark.parametrize(("features", "group"), [(70, 128), (48, 12), (9, 6)])
@pytest.mark.parametrize("rows", [3, 17, 40])
def test_whole_linears_on_cuda(rows: int, features: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed weights, and a byte a level, on PyTorch's operators; a kernel would read what is not there."""
    monkeypatch.setattr(triton_units, "_triton_installed", lambda: False)
    packed: Any = MinifloatTensor.from_hp(torch.randn(features, 2 * group), [1, group], "e2m1", "e3m4")
    levels: Any = LevelTensor.from_packed(packed.with_parts(act_fmt="e2m3"), "int8")
    qdata, scale, x = on_gpu(packed.qdata, packed.scale, torch.empty(rows, 2 * group, dtype=torch.bfloat16))
    weight = packed.with_parts(qdata=qdata, scale=scale)
    tokens, scales = on_gpu(int8(rows, 2 * group), torch.empty(rows, 1))
    stored, scale = on_gpu(levels.qdata, levels.scale)
    with GPU, CudaRules() as rules:
        assert F.linear(x, weight).shape == (rows, features)
        assert level_linear.level_linear(tokens, scales, stored, scale, None, torch.bfloat16).shape == (rows, features)
    assert torch.ops.aten._int_mm in rules.seen
