"""Scales are the same bits on CPUs and GPUs: no number that is not a power of two divides a float32 tensor."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao import QuantConfig
from fp4dit_ao.config import RECIPES
from fp4dit_ao.formats import CODEBOOK_SETS, CODEBOOKS, NumberFormat, parse
from fp4dit_ao.formats.codebook_groups import CodebookSet
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.token_quantization import MOST_DIGITS, digits, operator_tokens
from fp4dit_ao.observers import StaticActivationObserver, TokenActivationObserver
from fp4dit_ao.observers.codebook_search import search
from fp4dit_ao.observers.scale_search import SEARCHES
from fp4dit_ao.ops import choose_scale, dequantize, divided, fake_quantize, quantize
from fp4dit_ao.ops.block_scale import BLOCKS, ELEMENTS, choose_block_scale
from fp4dit_ao.schemes import scheme_of
from tests.cuda_rules import GPU, CudaRules, on_gpu

FLOAT_FORMATS = [f"e{e}m{m}" for e, m in itertools.product(range(7), range(8)) if 1 <= e + m < 8 and (e, m) != (6, 1)]
FORMATS = [*FLOAT_FORMATS, "e4m3fn", *CODEBOOKS]


def input_for(name: str, *shape: int, dtype: torch.dtype) -> Tensor:
    """A tensor that says it is on a GPU; for codebooks, whose levels are looked up, one that has values."""
    x = torch.randn(shape).to(dtype)
    return x if name in CODEBOOKS else on_gpu(x)[0]


def mode_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    return GPU if x.is_cuda else contextlib.nullcontext()


def wild(count: int, seed: int = 0) -> Tensor:
    """Finite positive float32 of all magnitudes, subnormals included."""
    bits = torch.randint(0, 0x7F800000, (count,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    return bits.view(torch.float32)


@pytest.mark.parametrize("number", sorted({parse(name).lattice_max for name in FORMATS} | {120, 448 * 6}))
def test_a_quotient_is_correctly_rounded_however_float64_divides(number: int) -> None:
    """The oracle is the CPU's division of two tensors, which IEEE 754 defines."""
    x = torch.cat([wild(100_000), torch.arange(1.0, 4097) * number, torch.tensor([0.0, torch.inf, torch.nan])])
    exact = x / torch.full_like(x, number)
    assert divided(x, number).view(torch.int32).equal(exact.view(torch.int32))
    by_reciprocal = (x.double() * (1 / number)).float()  # as CUDA and Inductor have it
    assert by_reciprocal.view(torch.int32).equal(exact.view(torch.int32))
    in_float32 = x * torch.tensor(1 / number)
    normal = exact >= torch.finfo(torch.float32).tiny  # float32's smallest reciprocals are not normal
    if number & number - 1:
        assert not in_float32[normal].equal(exact[normal]), "then there would be nothing to mend"


def test_the_rules_see_a_division() -> None:
    (x,) = on_gpu(torch.empty(4))
    for wrong in (lambda: x / 12.0, lambda: x.div_(3), lambda: torch.div(x, 7), lambda: x / torch.tensor(2.0)):
        with pytest.raises(AssertionError, match="divided by"), GPU, CudaRules():
            wrong()
    with GPU, CudaRules():
        assert (x / 16).device.type == (x / x.amax()).device.type == divided(x, 12.0).device.type == "cuda"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scales_codes_and_values(name: str, dtype: torch.dtype) -> None:
    x = input_for(name, 8, 64, dtype=dtype)
    for block in ([1, -1], [1, 32], [-1, -1]):
        with mode_of(x), CudaRules() as rules:
            scale = choose_scale(x, block, name, torch.float32)
            dequantize(quantize(x, block, scale, name), block, scale, name, dtype)
            fake_quantize(x, block, scale, name, dtype)
        assert scale.device.type == x.device.type
        assert torch.ops.aten.div in rules.seen


@pytest.mark.parametrize("name", [name for name in FORMATS if digits(parse(name)) <= MOST_DIGITS])
def test_tokens(name: str) -> None:
    x = input_for(name, 2, 5, 64, dtype=torch.bfloat16)
    with mode_of(x), CudaRules():
        levels, scale = operator_tokens(x, name)
    assert levels.device.type == scale.device.type == x.device.type


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BLOCKS for name in ELEMENTS[kind]])
def test_block_scales(kind: str, name: str) -> None:
    (x,) = on_gpu(torch.empty(8, 64, dtype=torch.bfloat16))
    with GPU, CudaRules():
        choose_block_scale(x, [1, BLOCKS[kind]], name, kind)


@pytest.mark.parametrize(
    ("name", "fmt"),
    [*((name, "e2m1") for name in SEARCHES), *((name, "nf4") for name in SEARCHES if name != "four_over_six")],
)
def test_scale_searches(name: str, fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "shared_object", lambda: None)  # what GPUs run
    with CudaRules():
        SEARCHES.find(name)(torch.randn(4, 64), [1, 32], parse(fmt), torch.float16)


@pytest.mark.parametrize("codebooks", CODEBOOK_SETS.values(), ids=str)
def test_codebook_search(codebooks: CodebookSet) -> None:
    with CudaRules():
        search(torch.randn(4, 64), codebooks, 32)


@pytest.mark.parametrize("fmt", [parse("e2m3"), parse("nf4")], ids=str)
@pytest.mark.parametrize("observer", [TokenActivationObserver, StaticActivationObserver])
def test_observers_of_activations(observer: Any, fmt: NumberFormat) -> None:
    watching = observer(fmt)
    with CudaRules():
        watching(torch.randn(2, 5, 64))
        watching.fake_quantize = True
        watching(torch.randn(2, 5, 64))


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_whole_linears(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight rounded to nearest, its values, and its linear, on PyTorch's operators."""
    monkeypatch.setattr(native, "shared_object", lambda: None)
    config = QuantConfig.from_name(recipe)
    if config.weight_candidates:
        pytest.skip("its format needs data")
    with CudaRules(), torch.no_grad():
        weight: Any = scheme_of(config).round_to_nearest("fc", torch.randn(16, 256), config)
        weight.dequantize(torch.float32)
        F.linear(torch.randn(5, 256), weight)
