"""Attention on int8 levels, against the formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp4dit_ao.formats import parse
from fp4dit_ao.kernels import attention as kernel
from fp4dit_ao.ops import choose_scale

OP = torch.ops.fp4dit_ao
needs_kernel = pytest.mark.skipif(not kernel.kernels(), reason="needs the compiled library and AVX-512 VNNI")
KERNELS = list(kernel.kernels())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int, heads: int, queries: int, keys: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (queries, keys, keys)
    return tuple(normal(batch, heads, size, dim, seed=seed + i) * 2 for i, size in enumerate(sizes))


def rounded(x: Tensor, fmt: str) -> Tensor:
    """float64, token by token."""
    scale = choose_scale(x, [1] * (x.ndim - 1) + [-1], fmt, torch.float32)
    return parse(fmt).round(x.float() / scale).double() * scale.double()


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, fmt: str) -> tuple[Tensor, Tensor]:
    """The result, and the sum of the magnitudes of its terms, in float64; zeros where every key is masked."""
    q, k, v = (rounded(x, fmt) for x in (q, k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.double()
    weights = torch.softmax(scores, -1).nan_to_num(0.0)
    return weights @ v, weights @ v.abs()


def check(y: Tensor, expected: tuple[Tensor, Tensor], tolerance: float) -> None:
    value, magnitude = expected
    assert y.shape == value.shape
    assert ((y.double() - value).abs() <= tolerance * magnitude + 1e-30).all()


@needs_kernel
@settings(derandomize=True, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 60), st.integers(1, 600), st.integers(1, 256),
    st.sampled_from(["e2m3", "int8", "int6", "e3m0", "nf4", "e3m4", "e3m3"]), st.sampled_from([None, 0.05, 1.0]),
    st.integers(0, 99),
)  # fmt: skip
def test_any_shape(batch, heads, queries, keys, dim, fmt, scale, seed) -> None:
    q, k, v = inputs(batch, heads, queries, keys, dim, seed)
    with torch.no_grad():
        y = OP.attention(q, k, v, None, scale, fmt)
    # a score of some hundreds is known to 2^-24 of itself: an exponential's relative error
    largest = float((rounded(q, fmt) @ rounded(k, fmt).mT).abs().max()) * (dim**-0.5 if scale is None else scale)
    check(y, exact(q, k, v, None, scale, fmt), 4e-6 + 2e-7 * largest)


@needs_kernel
@pytest.mark.parametrize(
    "shape", [(2, 3, 17, 70), (2, 1, 17, 70), (1, 1, 1, 70), (1, 3, 17, 1), (17, 70), (2, 1, 1, 70)]
)
@pytest.mark.parametrize("kind", ["bool", "float", "bfloat16"])
def test_masks(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = inputs(2, 3, 17, 70, 72)
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    mask = keep if kind == "bool" else torch.where(keep, normal(*shape), -math.inf)
    mask = mask.bfloat16() if kind == "bfloat16" else mask
    y = OP.attention(q, k, v, mask, None, "e2m3")
    assert torch.isfinite(y).all()
    check(y, exact(q, k, v, mask, None, "e2m3"), 1e-5)


@needs_kernel
def test_a_query_without_keys_gets_zeros() -> None:
    q, k, v = inputs(1, 2, 30, 300, 64)
    mask = torch.ones(30, 300, dtype=torch.bool)
    mask[7] = False
    mask[8, :256] = False  # the whole first block of keys
    y = OP.attention(q, k, v, mask, None, "e2m3")
    assert (y[:, :, 7] == 0).all()
    check(y, exact(q, k, v, mask, None, "e2m3"), 1e-5)
    assert OP.attention(*inputs(1, 2, 5, 0, 64), None, None, "e2m3").eq(0).all()
    assert OP.attention(*inputs(0, 2, 5, 5, 64), None, None, "e2m3").shape == (0, 2, 5, 64)
    assert OP.attention(*inputs(1, 2, 0, 5, 64), None, None, "e2m3").shape == (1, 2, 0, 64)


def in_bfloat16(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, fmt: str, name: str) -> Tensor:
    levels = [part for x in (q, k, v) for part in kernel._levels(x, fmt)]
    return kernel.run(*levels, mask, q.shape[-1] ** -0.5, torch.bfloat16, name)


@pytest.mark.parametrize("name", KERNELS)
@settings(derandomize=True, max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 80), st.integers(1, 600), st.integers(1, 256),
    st.sampled_from(["e2m3", "int8", "int6", "e3m0", "nf4"]), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_every_kernel_in_bfloat16(name, batch, heads, queries, keys, dim, fmt, masked, seed) -> None:
    q, k, v = inputs(batch, heads, queries, keys, dim, seed)
    mask = torch.zeros(heads, queries, keys)
    if masked:
        draw = torch.rand(mask.shape, generator=torch.Generator().manual_seed(seed))
        mask = torch.where(draw > 0.3, draw, -math.inf)
    y = in_bfloat16(q, k, v, mask if masked else None, fmt, name)
    # a weight and the result are each rounded to 8 bits, that is by at most 2^-8 of themselves
    check(y, exact(q, k, v, mask, None, fmt), 2 * 2**-8 + 2e-4)


@pytest.mark.parametrize("name", KERNELS)
def test_weights_of_many_keys_do_not_drift(name: str) -> None:
    """Equal keys: every weight is the same, and the result the mean of the values, to bfloat16's last place."""
    q, k, v = (
        normal(1, 1, 40, 72),
        normal(1, 1, 1, 72, seed=1).expand(1, 1, 5000, 72),
        normal(1, 1, 5000, 72, seed=2) + 3,
    )
    y = in_bfloat16(q, k, v, None, "int8", name)
    mean = rounded(v, "int8").mean(2, keepdim=True).expand_as(y)
    assert (y.double() - mean).abs().max() <= 2**-8 * mean.abs().max()


@pytest.mark.parametrize("name", KERNELS)
def test_special_values_in_bfloat16(name: str) -> None:
    """A NaN stays in its query; a query whose keys are all masked gets zeros; a token of zeros attends evenly."""
    q, k, v = inputs(1, 2, 40, 300, 64)
    q[0, 0, 3, 5] = torch.nan
    q[0, 1, 4] = 0
    mask = torch.zeros(40, 300)
    mask[7] = -math.inf
    mask[8, :256] = -math.inf  # the whole first block of keys
    y = in_bfloat16(q, k, v, mask, "e2m3", name)
    assert y[0, 0, 3].isnan().all() and (y[:, :, 7] == 0).all()
    rest = [n for n in range(40) if n != 3]
    check(y[:, :, rest], tuple(x[:, :, rest] for x in exact(q, k, v, mask, None, "e2m3")), 2**-7)
    k[0, 1, 2, 0] = torch.nan
    assert in_bfloat16(q, k, v, None, "e2m3", name)[0, 1].isnan().all()


def test_a_kernel_that_cannot_compute_this_says_so() -> None:
    if "amx" not in KERNELS:
        pytest.skip("needs AMX")
    q, k, v = inputs(1, 1, 4, 4, 8)
    levels = [part for x in (q, k, v) for part in kernel._levels(x, "e2m3")]
    with pytest.raises(RuntimeError, match="amx cannot compute this"):
        kernel.run(*levels, None, 1.0, torch.float32, "amx")


@needs_kernel
@pytest.mark.parametrize("fmt", ["e2m3", "e3m4"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 1.2e-2)])
def test_half_precision(dtype: torch.dtype, tolerance: float, fmt: str) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, 3, 50, 300, 72))
    y = OP.attention(q, k, v, None, None, fmt)
    assert y.dtype == dtype
    check(y, exact(q, k, v, None, None, fmt), tolerance)
    pytorch = F.scaled_dot_product_attention(*(rounded(x, fmt).to(dtype) for x in (q, k, v)))
    value, _ = exact(q, k, v, None, None, fmt)
    assert (y.double() - value).norm() <= 1.05 * (pytorch.double() - value).norm(), "no worse than PyTorch's own"


@needs_kernel
def test_a_nan_token_stays_visible() -> None:
    q, k, v = inputs(1, 2, 30, 40, 64)
    q[0, 0, 3, 5] = torch.nan
    y = OP.attention(q, k, v, None, None, "e2m3")
    assert y[0, 0, 3].isnan().all()
    assert torch.isfinite(y[0, 0, :3]).all() and torch.isfinite(y[0, 0, 4:]).all() and torch.isfinite(y[0, 1]).all()
    k[0, 1, 2, 0] = torch.nan
    assert OP.attention(q, k, v, None, None, "e2m3")[0, 1].isnan().all()


@needs_kernel
def test_layouts() -> None:
    """q, k and v come as views of (batch, tokens, heads, dim), and the result goes back that way without a copy."""
    q, k, v = inputs(2, 3, 17, 70, 72)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    y = OP.attention(*views, None, None, "e2m3")
    assert torch.equal(y, OP.attention(q, k, v, None, None, "e2m3"))
    assert y.transpose(1, 2).is_contiguous()
    meta = [torch.empty(shape, device="meta", dtype=torch.int8) for shape in [(1, 2, 3, 17, 72), (1, 2, 3, 70, 72)]]
    scales = [torch.empty(x.shape[1:4], device="meta") for x in meta]
    fake = OP.int8_attention(meta[0], scales[0], meta[1], scales[1], meta[1], scales[1], None, 1.0, torch.float32)
    assert (fake.shape, fake.stride()) == (y.shape, y.stride())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in inputs(1, 2, 700, 300, 64))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            results.append(OP.attention(q, k, v, None, None, "e2m3"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_kernel
def test_levels_of_two_digits_up_to_the_largest_score() -> None:
    """E3M4: every level is 1984, so that a score of 256 features is about 2^30."""
    x = torch.ones(1, 1, 3, 256) * torch.tensor([1.0, -1.0, 2.0])[:, None]
    y = OP.attention(x, x, x, None, 1e-2, "e3m4")
    check(y, exact(x, x, x, None, 1e-2, "e3m4"), 1e-5)
    for fmt, unit in (("e3m4", "int8 scores, compiled kernel"), ("e4m3fn", "PyTorch's attention, rounded values")):
        operands = kernel.AttentionOperands(parse(fmt), torch.device("cpu"), 256)
        assert kernel.ATTENTION.pick(operands).name == unit, "two digits, three digits"


@pytest.mark.parametrize("fmt", ["e2m3", "e3m4"])
@pytest.mark.parametrize("mask", [None, torch.rand(17, 70) > 0.5], ids=["all", "masked"])
def test_where_the_kernel_does_not_fit_it_is_pytorchs(fmt: str, mask: Tensor | None, monkeypatch) -> None:
    monkeypatch.setattr(kernel, "kernels", dict)
    q, k, v = inputs(2, 3, 17, 70, 72)
    check(OP.attention(q, k, v, mask, None, fmt), exact(q, k, v, mask, None, fmt), 1e-5)


@pytest.mark.parametrize("shared", [(1, 3), (2, 1), (1, 1)], ids=["batch", "heads", "both"])
def test_keys_may_be_shared_as_pytorch_shares_them(shared: tuple[int, int]) -> None:
    """Such as one text for all images of a batch."""
    q, k, v = normal(2, 3, 17, 72, seed=0), normal(*shared, 70, 72, seed=1), normal(*shared, 70, 72, seed=2)
    each = [x.expand(2, 3, -1, -1) for x in (k, v)]
    y = OP.attention(q, k, v, None, None, "e2m3")
    assert y.shape == q.shape
    check(y, exact(q, *each, None, None, "e2m3"), 1e-5)


@pytest.mark.parametrize("shape", [(3, 9, 64), (2, 2, 9, 300), (1, 2, 2, 9, 64)], ids=["3-D", "wide heads", "5-D"])
def test_what_the_kernel_does_not_take_runs_all_the_same(shape: tuple[int, ...]) -> None:
    q, k, v = (normal(*shape, seed=i) for i in range(3))
    check(OP.attention(q, k, v, None, None, "e2m3"), exact(q, k, v, None, None, "e2m3"), 1e-5)


@needs_kernel
def test_compiles_without_a_break() -> None:
    compiled = torch.compile(lambda *args: OP.attention(*args, None, None, "e2m3") * 2, fullgraph=True, dynamic=True)
    for tokens in (17, 40):
        q, k, v = inputs(2, 3, tokens, 70, 72)
        expected = OP.attention(q, k, v, None, None, "e2m3") * 2
        assert (compiled(q, k, v) - expected).norm() <= 1e-6 * expected.norm()


@needs_kernel
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"k": torch.zeros(1, 1, 2, 5, 32, dtype=torch.int8)},
            r"k has shape \(1, 1, 2, 5, 32\); expected \(1, 1, 2, 5, 16\)",
        ),
        ({"v": torch.zeros(1, 1, 2, 6, 16, dtype=torch.int8)}, r"v has shape \(1, 1, 2, 6, 16\); .* that of k"),
        ({"v": torch.zeros(2, 1, 2, 5, 16, dtype=torch.int8)}, r"v has shape \(2, 1, 2, 5, 16\)"),
        ({"q": torch.zeros(1, 1, 2, 5, 16)}, "q has torch.float32; expected torch.int8"),
        ({"q": torch.zeros(1, 2, 5, 16, dtype=torch.int8)}, r"q has shape \(1, 2, 5, 16\); expected \(digits, batch"),
        ({"q": torch.zeros(3, 1, 2, 5, 16, dtype=torch.int8)}, "q has 3 digits; expected 1 to 2"),
        ({"q": torch.zeros(1, 1, 2, 5, 300, dtype=torch.int8)}, "q has heads of 300 features; expected at most 256"),
        ({"q_scale": torch.ones(1, 2, 4)}, r"q_scale has shape \(1, 2, 4\); expected \(1, 2, 5\), one for each token"),
        ({"output_dtype": torch.float64}, "output_dtype has torch.float64; expected one of torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong: dict, message: str) -> None:
    arguments = {}
    for name in "qkv":
        arguments |= {name: torch.zeros(1, 1, 2, 5, 16, dtype=torch.int8), f"{name}_scale": torch.ones(1, 2, 5)}
    arguments |= {"bias": None, "scale": 1.0, "output_dtype": torch.float32}
    with pytest.raises(ValueError, match=f"^int8_attention: {message}"):
        kernel.run(**(arguments | wrong))
