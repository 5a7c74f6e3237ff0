"""Attention with FP8 scores: on a GPU if there is one, else in Triton's interpreter; and when it is taken."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import attention, attention_backend, fp8_attention
from fp4dit_ao.kernels.attention_backend import AttentionShape
from fp4dit_ao.kernels.cuda import int8_linear as cuda_units
from fp4dit_ao.ops import choose_scale, fake_quantize

pytest.importorskip("triton", reason="Triton has no build for this platform")
interpreter = pytest.importorskip("tests.kernels.interpreter")
DEVICE = interpreter.DEVICE
GPU = torch.device("cuda", 0)
SHAPE = AttentionShape(GPU, torch.bfloat16, (2, 16, 4096, 72), 4096, None)


@pytest.fixture(scope="module")
def kernel() -> Any:
    return interpreter.loaded("triton_attention")


def rounded(x: Tensor) -> Tensor:
    block = [1, 1, 1, -1]
    return fake_quantize(x, block, choose_scale(x, block, "e2m3", torch.float32), "e2m3", torch.float64)


def exact(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of rounded values in float64."""
    return F.scaled_dot_product_attention(rounded(q), rounded(k), rounded(v), scale=scale)


@pytest.mark.parametrize("dim", [16, 24, 64, 72, 88, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (20, 40), (33, 64)])
def test_it_is_attention(kernel: Any, dim: int, queries: int, keys: int) -> None:
    torch.manual_seed(dim + queries)
    q, k, v = (torch.randn(2, 3, tokens, dim) for tokens in (queries, keys, keys))
    levels = [x.to(DEVICE) for y in (q, k) for x in fp8_attention._levels(y, "e2m3")]
    held = rounded(v).half().transpose(1, 2).contiguous().to(DEVICE)
    config = kernel.Config(block_m=64 if DEVICE == "cuda" else 16, block_n=32, warps=4, stages=2)
    found = kernel.run(*levels, held, dim**-0.5, config).transpose(1, 2).cpu().double()
    expected = exact(q, k, v)
    assert found.shape == expected.shape
    assert (found - expected).norm() < 2**-8 * expected.norm()


def test_large_scores_do_not_overflow(kernel: Any) -> None:
    q, k, v = (100 * torch.randn(1, 2, 40, 64) for _ in range(3))
    levels = [x.to(DEVICE) for y in (q, k) for x in fp8_attention._levels(y, "e2m3")]
    held = rounded(v).half().transpose(1, 2).contiguous().to(DEVICE)
    found = kernel.run(*levels, held, 0.125, kernel.Config(64 if DEVICE == "cuda" else 16, 32, 4, 2)).transpose(1, 2)
    assert torch.isfinite(found).all()
    expected = exact(q, k, v)
    assert (found.cpu().double() - expected).norm() < 2**-8 * expected.norm()


@pytest.mark.parametrize("dim", [16, 24, 64, 72, 80, 96, 128])
def test_columns_hold_the_head(kernel: Any, dim: int) -> None:
    first, rest = kernel.columns(dim)
    assert first + rest >= dim > first - 16
    assert all(size & (size - 1) == 0 for size in (first, rest))
    assert fp8_attention.width(dim) >= dim and fp8_attention.width(dim) >= 32


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_operator_agrees_with_rounded_values(scale: float | None) -> None:
    q, k, v = (torch.randn(2, 3, tokens, 72).bfloat16() for tokens in (20, 40, 40))
    held = rounded(v).bfloat16()
    found = fp8_attention.attention(q, k, held, scale, "e2m3")
    assert found.dtype == torch.bfloat16 and found.shape == q.shape
    expected = exact(q, k, v, scale)
    assert (found.double() - expected).norm() < 2**-7 * expected.norm()
    compiled = torch.compile(lambda *x: fp8_attention.attention(*x, scale, "e2m3"), fullgraph=True)(q, k, held)
    assert torch.allclose(compiled.float(), found.float(), atol=2**-6)


def test_the_operator_traces_as_it_runs() -> None:
    q, k, v = (torch.randn(2, 3, tokens, 72).bfloat16() for tokens in (20, 40, 40))
    levels = *fp8_attention._levels(q, "e2m3"), *fp8_attention._levels(k, "e2m3")
    arguments = (*levels, v.transpose(1, 2), 0.1)
    checks = ("test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fp4dit_ao.fp8_attention.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("change", "fmt", "expected"),
    [
        ({}, "e2m3", True),
        ({"query": (1, 24, 512, 128)}, "e2m3", True),
        ({"query": (1, 24, 512, 256)}, "e2m3", False),
        ({"query": (1, 24, 512, 20)}, "e2m3", False),
        ({"mask": (2, 1, 1, 300)}, "e2m3", False),
        ({"dtype": torch.float32}, "e2m3", False),
        ({}, "int8", False),
    ],
)
def test_what_it_takes(change: dict[str, Any], fmt: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_units, "capability", lambda device: (9, 0))
    monkeypatch.setattr(fp8_attention, "is_faster", lambda shape: True)
    assert fp8_attention.supports(parse(fmt), SHAPE._replace(**change)) == expected
    assert not fp8_attention.supports(parse(fmt), None)
    monkeypatch.setattr(cuda_units, "capability", lambda device: (8, 0))
    assert not fp8_attention.supports(parse("e2m3"), SHAPE)


@pytest.mark.parametrize(("ours", "theirs", "faster"), [(1.0, 2.0, True), (2.0, 1.0, False), (0.99, 1.0, False)])
def test_it_is_taken_where_it_is_faster(
    ours: float, theirs: float, faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[AttentionShape] = []

    def seconds(shape: AttentionShape) -> float:
        measured.append(shape)
        return ours

    monkeypatch.setattr(fp8_attention, "_FASTER", {})
    monkeypatch.setattr(fp8_attention, "_seconds", seconds)
    monkeypatch.setattr(attention_backend, "fastest", lambda shape: attention_backend.CANDIDATES[0])
    monkeypatch.setattr(attention_backend, "seconds", lambda backend, shape: theirs)
    assert fp8_attention.is_faster(SHAPE) == faster == fp8_attention.is_faster(SHAPE)
    assert measured == [SHAPE]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not fp8_attention.is_faster(SHAPE._replace(keys=7))


def test_attention_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is faster, in eager mode and with gradients, which go straight through."""
    monkeypatch.setattr(attention, "kernels", dict)
    monkeypatch.setattr(attention_backend, "DEVICES", ("cpu",))
    monkeypatch.setattr(fp8_attention, "supports", lambda fmt, shape: shape is not None and shape.mask is None)
    monkeypatch.setattr(attention_backend, "fastest", lambda shape: None)
    q, k, v = (torch.randn(2, 3, tokens, 24, requires_grad=True) for tokens in (5, 7, 7))
    y = torch.ops.fp4dit_ao.attention(q, k, v, None, None, "e2m3")
    assert torch.allclose(y.double(), exact(q, k, v), atol=1e-5)
    y.sum().backward()
    assert q.grad is not None and v.grad is not None
    seen: list[Any] = []
    monkeypatch.setattr(fp8_attention, "attention", lambda *a: seen.append(a))
    torch.ops.fp4dit_ao.attention(q.detach(), k.detach(), v.detach(), torch.zeros(1, 1, 1, 7), None, "e2m3")
    assert not seen, "a mask goes to PyTorch's attention"


def test_a_kernel_that_computes_something_else_is_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = AttentionShape(torch.device("cpu"), torch.bfloat16, (2, 3, 40, 72), 50, None)
    monkeypatch.setattr(fp8_attention, "_on_triton", fp8_attention._on_operators)
    assert 0 < fp8_attention._seconds(shape) < float("inf")
    monkeypatch.setattr(fp8_attention, "_on_triton", lambda *x: fp8_attention._on_operators(*x) * 1.1)
    assert fp8_attention._seconds(shape) == float("inf")

    def fails(*x: Any) -> Tensor:
        raise RuntimeError("out of shared memory")

    monkeypatch.setattr(fp8_attention, "_on_triton", fails)
    assert fp8_attention._seconds(shape) == float("inf")
