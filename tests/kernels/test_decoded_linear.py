"""Linears with codebook groups as GPUs compute them: decoded to bytes, then one product of bytes.

Decoding runs in Triton's interpreter where there is no GPU, the products on the CPU's implementations of PyTorch's operators.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4dit_ao import CodebookTensor, QuantConfig
from fp4dit_ao.formats import CODEBOOK_SETS, parse
from fp4dit_ao.kernels import codebook_dispatch, codebook_linear, decoded_linear
from fp4dit_ao.kernels.codebook_dispatch import CODEBOOK_LINEAR
from fp4dit_ao.kernels.codebook_linear import reference_codebook_linear
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.cuda import int8_linear as cuda_units
from fp4dit_ao.kernels.token_quantization import quantize_tokens
from fp4dit_ao.schemes import scheme_of
from tests.cuda_rules import GPU, CudaRules, on_gpu
from tests.kernels.test_codebook_linear import bits, problem

pytest.importorskip("triton", reason="Triton has no build for this platform")
interpreter = pytest.importorskip("tests.kernels.interpreter")
DEVICE = interpreter.DEVICE
FP8 = torch.float8_e4m3fn
FP8_UNIT, INT8_UNIT = "FP8, decoded by Triton, row-wise product", "int8, decoded by Triton, PyTorch's product"


@pytest.fixture(scope="module")
def kernel() -> Any:
    return interpreter.loaded("triton_decode")


def stored(
    features: int, groups: int, group: int, seed: int = 0, codebooks: Tensor | None = None
) -> tuple[Tensor, ...]:
    p = problem(1, features, groups, group, seed)
    return p["qdata"], p["index"], p["codebooks"] if codebooks is None else codebooks


@settings(max_examples=10)
@given(
    features=st.integers(1, 70), groups=st.integers(1, 5), pairs=st.integers(1, 80), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_decoding_looks_every_code_up(kernel: Any, features: int, groups: int, pairs: int, seed: int) -> None:
    weight = stored(features, groups, 2 * pairs, seed)
    expected = codebook_linear.decode(*weight, 2 * pairs)
    found = kernel.decode(*(x.to(DEVICE) for x in weight), 2 * pairs, torch.int8).cpu()
    assert found.dtype == torch.int8
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CODEBOOK_SETS)
@pytest.mark.parametrize("group", [32, 128, 112])
def test_decoding_to_fp8_is_exact(kernel: Any, name: str, group: int) -> None:
    weight = stored(40, 3, group, codebooks=CODEBOOK_SETS[name].tensor())
    found = kernel.decode(*(x.to(DEVICE) for x in weight), group, FP8).cpu()
    assert torch.equal(found.float(), codebook_linear.decode(*weight, group).float())


def test_strides_and_no_rows(kernel: Any) -> None:
    qdata, index, codebooks = stored(40, 3, 32)
    columns = (
        qdata.T.contiguous().T.to(DEVICE),
        index.T.contiguous().T.to(DEVICE),
        codebooks.T.contiguous().T.to(DEVICE),
    )
    assert torch.equal(
        kernel.decode(*columns, 32, torch.int8).cpu(), codebook_linear.decode(qdata, index, codebooks, 32)
    )
    assert kernel.decode(qdata[:0].to(DEVICE), index[:0].to(DEVICE), codebooks.to(DEVICE), 32, torch.int8).shape == (
        0,
        96,
    )


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize("dtype", list(native.OUTPUTS), ids=str)
@pytest.mark.parametrize("shape", [(1, 70, 2, 128), (33, 48, 3, 12), (17, 5, 1, 4)])
def test_int8_gives_the_specifications_bits(digits: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    p = problem(*shape, digits=digits, dtype=dtype)  # type: ignore[misc]
    on_device = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in p.items()}
    assert torch.equal(bits(decoded_linear.run(**on_device).cpu()), bits(reference_codebook_linear(**p)))


@pytest.mark.parametrize("name", CODEBOOK_SETS)
@pytest.mark.parametrize("bias", [None, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 40])
def test_fp8_is_as_near_as_bfloat16(name: str, bias: torch.dtype | None, rows: int) -> None:
    """Operands are exact in E4M3, so that only sums and the result are rounded, the result to bfloat16's 8 bits."""
    p = problem(rows, 48, 3, 128, dtype=torch.float32)
    tokens = parse("e2m3").round(p["tokens"].float() / 2)
    p |= {"tokens": tokens.to(torch.int8), "codebooks": CODEBOOK_SETS[name].tensor()}
    p["bias"] = None if bias is None else p["bias"].to(bias)
    exact = reference_codebook_linear(**p).double()
    p["tokens"] = tokens.to(FP8)
    assert torch.equal(p["tokens"].float(), tokens)
    given = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in p.items()}
    got = decoded_linear.fp8_codebook_linear(
        **{name: x for name, x in given.items() if name not in ("output_dtype", "digits")}
    ).cpu()
    assert got.dtype == torch.bfloat16
    assert ((got.double() - exact).norm() / exact.norm()) < 2**-8
    worst = (exact.abs() * 2**-8 + exact.abs().max() * 2**-12).clamp(min=1e-30)
    assert ((got.double() - exact).abs() <= worst).all()


@pytest.fixture(params=[(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0)], ids=str)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A machine that answers as if it had such a GPU, with Triton installed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(cuda_units, "_triton_installed", lambda: True)
    cuda_units.capability.cache_clear()
    yield request.param
    cuda_units.capability.cache_clear()


@pytest.mark.parametrize(
    ("change", "units"),
    [
        ({}, {(7, 5): "int8, PyTorch operators", (8, 0): INT8_UNIT, (8, 6): INT8_UNIT}),
        ({"fmt": "of somebody"}, {(7, 5): "int8, PyTorch operators"}),
        ({"act_fmt": "int8"}, {(7, 5): "int8, PyTorch operators"}),
        ({"act_fmt": "e3m4"}, {(7, 5): "int8, PyTorch operators"}),
        ({"dtype": torch.float32}, {(7, 5): "int8, PyTorch operators"}),
        ({"qdata": torch.empty(70, 64)}, {(7, 5): "int8, PyTorch operators"}),
        ({"act_fmt": None}, {}),
    ],
)
def test_what_is_picked_on_gpus(change: dict[str, Any], units: dict[Any, str], capability: tuple[int, int]) -> None:
    """FP8 from Ada on where operands are exact and the result is bfloat16, int8 elsewhere from Ampere on."""
    gpu = torch.device("cuda", 0)
    asked = {"qdata": torch.empty(64, 64), "group_size": 32, "fmt": "nf4_groups", "act_fmt": "e2m3", "device": gpu}
    found = CODEBOOK_LINEAR.pick(codebook_dispatch.operands(**({**asked, "dtype": torch.bfloat16} | change)))
    default = "float32, dequantized" if not units else INT8_UNIT if change else FP8_UNIT
    assert found.name == units.get(capability, default)


@pytest.mark.parametrize("recipe", ["w4a6_codebook", "w4a8_codebook"])
@pytest.mark.parametrize("name", [FP8_UNIT, INT8_UNIT])
def test_a_units_linear_is_the_tensors(recipe: str, name: str) -> None:
    config = QuantConfig.from_name(recipe)
    weight: Any = scheme_of(config).round_to_nearest("fc", torch.randn(48, 256).bfloat16(), config)
    x, bias = torch.randn(2, 5, 256).bfloat16(), torch.randn(48).bfloat16()
    expected = F.linear(x, weight, bias)
    (unit,) = (unit for unit in CODEBOOK_LINEAR.units if unit.name == name)
    if name == FP8_UNIT and recipe == "w4a8_codebook":
        pytest.skip("INT8 tokens are not exact in E4M3")
    got = unit.run(
        x,
        weight.qdata,
        weight.index,
        weight.row_scale,
        weight.codebooks,
        weight.group_size,
        parse(weight.act_fmt),
        bias,
    )
    assert got.dtype == expected.dtype and got.shape == expected.shape
    if name == INT8_UNIT:
        assert torch.equal(got, expected)
    else:
        assert torch.allclose(got.float(), expected.float(), rtol=2**-7, atol=float(expected.abs().max()) * 2**-9)


def test_pytorch_takes_what_the_products_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, strides and types of operands and scales, by CUDA's rules."""
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    monkeypatch.setattr(decoded_linear, "decoded", lambda q, *_: q.new_empty((q.shape[0], q.shape[1] * 2), dtype=_[-1]))
    for rows, features, depth in [(1, 48, 128), (40, 80, 256)]:
        tokens, eights, scale, qdata, row_scale, bias = on_gpu(
            torch.empty(rows, depth, dtype=torch.int8), torch.empty(rows, depth, dtype=FP8), torch.empty(rows, 1),
            torch.empty(features, depth // 2, dtype=torch.uint8), torch.empty(features), torch.empty(features),
        )  # fmt: skip
        with GPU, CudaRules() as rules:
            assert decoded_linear.codebook_product(tokens, qdata, qdata, qdata, 32).shape == (rows, features)
            arguments = eights, scale, qdata, qdata, qdata, row_scale, bias, 32
            assert decoded_linear.fp8_codebook_linear(*arguments).shape == (rows, features)
        assert {torch.ops.aten._int_mm, torch.ops.aten._scaled_mm} <= rules.seen


@pytest.mark.parametrize("name", ["codebook_product", "fp8_codebook_linear"])
def test_operators_trace_as_they_run(name: str) -> None:
    p = problem(5, 48, 2, 32)
    weight = p["qdata"], p["index"], CODEBOOK_SETS["nf4_groups"].tensor()
    tokens, scale = quantize_tokens(torch.randn(5, 64), "e2m3")
    arguments = (tokens, *weight, 32)
    if name.startswith("fp8"):
        arguments = (tokens.to(FP8), scale, *weight, p["row_scale"], p["bias"], 32)
    compares = ("test_schema",) if name == "codebook_product" else ()  # it cannot compare FP8 tensors
    checks = ("test_faketensor", "test_autograd_registration", *compares)
    torch.library.opcheck(getattr(torch.ops.fp4dit_ao, name).default, arguments, test_utils=checks)


def test_choosing_it_breaks_no_graph(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The questions asked of a GPU are asked while torch.compile traces; the CPU answers them as a GPU, and computes."""
    if capability not in ((8, 0), (9, 0)):
        pytest.skip("one of each is enough")
    decodes = lambda device, group_size: cuda_units.capability(torch.device("cuda", 0)) >= cuda_units.CAPABILITY  # noqa: E731
    weight: Any = CodebookTensor.from_codes(
        torch.randint(0, 16, (48, 64), dtype=torch.uint8), torch.randint(0, 16, (48, 2), dtype=torch.uint8),
        torch.rand(48), CODEBOOK_SETS["nf4_groups"].tensor(), "nf4_groups", "e2m3", torch.bfloat16,
    )  # fmt: skip
    x = torch.randn(5, 64).bfloat16()
    expected = F.linear(F.silu(x), weight)
    monkeypatch.setattr(native, "shared_object", lambda: None)
    gpu = torch.device("cuda", 0)
    with monkeypatch.context() as patch:
        patch.setattr(codebook_dispatch.triton_units, "decodes", decodes)
        patch.setattr(codebook_dispatch.triton_units, "capability", lambda device, c=capability: c)
        patch.setattr(decoded_linear, "decoded", lambda *a: codebook_linear.decode(*a[:4]).to(a[4]))
        patch.setattr(decoded_linear, "_few_tokens", lambda tokens, group_size: None)
        assert CODEBOOK_LINEAR.pick(
            codebook_dispatch.operands(weight.qdata, 32, "nf4_groups", "e2m3", gpu, torch.bfloat16)
        ).name == (FP8_UNIT if capability == (9, 0) else INT8_UNIT)
        got = torch.compile(lambda x: F.linear(F.silu(x), weight), fullgraph=True)(x)
    assert torch.allclose(got.float(), expected.float(), rtol=2**-6, atol=float(expected.abs().max()) * 2**-7)


@pytest.mark.parametrize("recipe", ["w4a6_codebook", "w4a8_codebook"])
def test_whole_linears_on_a_gpu(recipe: str, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """From input to output on tensors that say they are there, by the picked unit: shapes and types, and what CUDA refuses."""
    monkeypatch.setattr(Tensor, "contiguous", lambda x: x.clone(memory_format=torch.contiguous_format))
    if capability < (8, 0):
        pytest.skip("decoding by PyTorch's operators looks levels up, which needs values")
    config = QuantConfig.from_name(recipe)
    held: Any = scheme_of(config).round_to_nearest("fc", torch.randn(48, 256).bfloat16(), config)
    names = held.tensor_data_names
    parts = dict(zip(names, on_gpu(*(getattr(held, name) for name in names)), strict=True))
    x, bias = on_gpu(torch.empty(2, 5, 256, dtype=torch.bfloat16), torch.empty(48, dtype=torch.bfloat16))
    with GPU, CudaRules() as rules:
        y = F.linear(x, held.with_parts(**parts), bias)
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 48), torch.bfloat16, "cuda")
    on_fp8 = capability >= (8, 9) and recipe == "w4a6_codebook"
    own = torch.ops.fp4dit_ao
    assert (own.fp8_codebook_linear in rules.seen, own.codebook_product in rules.seen) == (on_fp8, not on_fp8)
