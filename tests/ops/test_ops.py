"""``torch.ops.fp4dit_ao``: every type, granularity and shape; eager and compiled; wrong input."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor, PerToken
from torchao.quantization.utils import get_block_size

import fp4dit_ao
from fp4dit_ao.formats import FloatFormat
from fp4dit_ao.ops import expand_scale

OPS = torch.ops.fp4dit_ao
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["e2m1", "e3m0", "e1m2", "e2m3", "e3m4", "int8", "e4m3fn"]
TINY = torch.finfo(torch.float32).tiny

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_name = pytest.mark.parametrize("name", NAMES)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chain(
    x: Tensor, block_size: list[int], name: str, scale_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, codes, dequantized), as a converted graph computes them."""
    scale = OPS.choose_scale(x, block_size, name, scale_dtype)
    codes = OPS.quantize(x, block_size, scale, name)
    return scale, codes, OPS.dequantize(codes, block_size, scale, name, x.dtype)


def blocks(shape: tuple[int, ...], block_size: list[int]) -> list[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """(index of its scale, slices) of every block."""
    full = [size if block == -1 else block for size, block in zip(shape, block_size, strict=True)]
    counts = [range(size // block) for size, block in zip(shape, full, strict=True)]
    return [
        (index, tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, full, strict=True)))
        for index in itertools.product(*counts)
    ]


def check_block_by_block(x: Tensor, block_size: list[int], name: str, scale_dtype: torch.dtype = torch.float32) -> None:
    """The ops against a loop over blocks in the definition's own words."""
    fmt = FloatFormat.parse(name)
    scale, codes, dequantized = chain(x, block_size, name, scale_dtype)
    assert (scale.dtype, codes.dtype, dequantized.dtype) == (scale_dtype, torch.uint8, x.dtype)
    assert codes.shape == dequantized.shape == x.shape
    found = blocks(tuple(x.shape), block_size)
    assert scale.numel() == len(found) and scale.ndim == x.ndim
    for index, place in found:
        block = x[place].float()
        expected = max(float(block.abs().max() / fmt.lattice_max), TINY)
        assert float(scale[index]) == float(torch.tensor(expected).to(scale_dtype))
        assert torch.equal(codes[place], fmt.encode(block / scale[index].float()))
        assert torch.equal(dequantized[place], (fmt.decode(codes[place]) * scale[index].float()).to(x.dtype))


# --- values ----------------------------------------------------------------------------------------------------------


@each_name
@each_dtype
@pytest.mark.parametrize(
    ("shape", "block_size"),
    [
        ((12,), [-1]),
        ((12,), [4]),
        ((3, 8), [-1, -1]),
        ((3, 8), [1, -1]),
        ((3, 8), [1, 4]),
        ((3, 8), [-1, 1]),
        ((3, 8), [1, 1]),
        ((4, 6), [2, 3]),
        ((2, 3, 5), [1, 1, -1]),
        ((2, 3, 5), [-1, -1, -1]),
        ((2, 3, 6), [1, 3, 2]),
        ((1, 1, 7), [1, 1, -1]),
        ((1, 2, 3, 4), [1, 1, 1, -1]),
        ((1, 2, 3, 4), [1, 2, 3, 4]),
        ((2, 2, 2, 6), [1, -1, 1, 3]),
    ],
    ids=str,
)
def test_every_granularity(name: str, dtype: torch.dtype, shape: tuple[int, ...], block_size: list[int]) -> None:
    check_block_by_block(normal(*shape, dtype=dtype), block_size, name)


@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
@each_name
def test_scale_types(name: str, scale_dtype: torch.dtype) -> None:
    check_block_by_block(normal(4, 64) * 0.02, [1, 32], name, scale_dtype)


@settings(derandomize=True, max_examples=60)
@given(data=st.data())
def test_any_shape_and_block(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    x = normal(*sizes, seed=data.draw(st.integers(0, 99))).permute(data.draw(st.permutations(range(len(sizes)))))
    divisors = [[-1, *(d for d in range(1, size + 1) if size % d == 0)] for size in x.shape]
    block_size = [data.draw(st.sampled_from(choices)) for choices in divisors]
    check_block_by_block(x, block_size, data.draw(st.sampled_from(NAMES)))


@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerRow(), PerToken(), PerGroup(16), PerAxis(0), PerAxis(1)], ids=str
)
@pytest.mark.parametrize("shape", [(6, 32), (2, 3, 32)], ids=str)
def test_torchao_granularities(granularity: object, shape: tuple[int, ...]) -> None:
    """torchao's own block sizes are taken as they come, with sizes in place of -1."""
    x = normal(*shape)
    block_size = list(get_block_size(x.shape, granularity))
    check_block_by_block(x, block_size, "e2m1")
    whole = [-1 if block == size else block for block, size in zip(block_size, x.shape, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(chain(x, block_size, "e2m1"), chain(x, whole, "e2m1"), strict=True))


@each_dtype
def test_any_memory_layout(dtype: torch.dtype) -> None:
    x = normal(8, 6, 16, dtype=dtype)
    for view in (x.transpose(0, 1), x.permute(2, 0, 1)[:, :, :4], x[::2, :, ::2], x[:1].expand(3, 6, 16)):
        for block_size in ([1, 1, -1], [1, 1, 2], [-1, -1, -1]):
            assert all(
                torch.equal(a, b)
                for a, b in zip(
                    chain(view, block_size, "e2m3"), chain(view.contiguous(), block_size, "e2m3"), strict=True
                )
            )


def test_scale_repeated_for_every_element() -> None:
    scale, codes, dequantized = chain(normal(4, 6), [2, 3], "e2m1")
    repeated = expand_scale(scale, codes, [2, 3])
    assert torch.equal(repeated, scale.repeat_interleave(2, 0).repeat_interleave(3, 1))
    assert torch.equal(FloatFormat.parse("e2m1").decode(codes) * repeated, dequantized)


@each_name
def test_a_second_quantization_changes_nothing(name: str) -> None:
    """Dequantized values are their own nearest levels: quantize(dequantize(codes)) == codes."""
    scale, codes, dequantized = chain(normal(16, 64), [1, 32], name)
    assert torch.equal(OPS.quantize(dequantized, [1, 32], scale, name), codes)


# --- values that are not numbers, and blocks of nothing --------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("scale_dtype", FLOATS, ids=str)
def test_a_block_of_zeros_stays_zero(dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype)
    x[1] = 1
    scale, codes, dequantized = chain(x, [1, -1], "e2m1", scale_dtype)
    assert (scale > 0).all() and float(scale[0].float()) >= TINY
    assert (codes[0] == 0).all()
    assert torch.equal(dequantized[0], x[0])


@each_dtype
def test_nan_is_visible_in_its_own_token_only(dtype: torch.dtype) -> None:
    x = normal(2, 3, 8, dtype=dtype)
    clean = chain(x, [1, 1, -1], "e2m3")[2]
    x[1, 2, 4] = torch.nan
    found = chain(x, [1, 1, -1], "e2m3")[2]
    assert found[1, 2].isnan().all()
    found[1, 2] = clean[1, 2]
    assert torch.equal(found, clean)


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_infinity_saturates_and_leaves_other_tokens_alone(infinity: float) -> None:
    x = normal(3, 8)
    clean = chain(x, [1, -1], "e2m3")[2]
    x[1, 4] = infinity
    scale, codes, found = chain(x, [1, -1], "e2m3")
    assert torch.isfinite(scale).all()
    assert FloatFormat.parse("e2m3").decode(codes)[1].tolist() == [0] * 4 + [math.copysign(60, infinity)] + [0] * 3
    assert not found.isnan().any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


def test_values_beyond_a_given_scale_saturate() -> None:
    codes = OPS.quantize(torch.tensor([1e30, -1e30, 13.0, 11.0]), [-1], torch.ones(1), "e2m1")
    assert FloatFormat.parse("e2m1").decode(codes).tolist() == [12, -12, 12, 12]


def test_float16_scales_keep_their_precision_below_its_normal_range() -> None:
    """0.0015 / 64 = 2.3e-5 is a float16 subnormal: raised to the smallest normal number, 6.1e-5, it would waste a level."""
    x = normal(4, 128) * 5e-4
    exact, stored = (OPS.choose_scale(x, [1, -1], "e3m0", dtype).float() for dtype in (torch.float32, torch.float16))
    assert (exact < torch.finfo(torch.float16).tiny).all()
    assert torch.allclose(stored, exact, rtol=1e-3)
    x = torch.full((1, 4), 1e-9)
    assert float(OPS.choose_scale(x, [1, -1], "e3m0", torch.float16)) == 2**-24


@pytest.mark.parametrize("value", [1e-45, 1e-39, 1e38, 3.4e38])
def test_the_ends_of_the_float32_range(value: float) -> None:
    x = torch.tensor([[value, -value, value / 2, 0.0]])
    scale, _, found = chain(x, [1, -1], "e2m1")
    assert float(scale) >= TINY and torch.isfinite(found).all()
    assert ((found - x).abs() <= 2 * scale).all()


@each_dtype
def test_no_tokens(dtype: torch.dtype) -> None:
    x = torch.empty(2, 0, 64, dtype=dtype)
    for block_size, groups in (([1, 1, -1], 1), ([1, 1, 16], 4)):
        scale, codes, dequantized = chain(x, block_size, "e2m3")
        assert scale.shape == (2, 0, groups)
        assert codes.shape == dequantized.shape == x.shape
    static = torch.ones(1, 1, 1)
    codes = OPS.quantize(x, [-1, -1, -1], static, "e2m3")
    assert OPS.dequantize(codes, [-1, -1, -1], static, "e2m3", dtype).shape == x.shape
    with pytest.raises((RuntimeError, IndexError), match="amax"):
        OPS.choose_scale(x, [-1, -1, -1], "e2m3", torch.float32)


@each_name
def test_how_far_float32_division_is_from_the_nearest_level(name: str) -> None:
    """Exact search: |x| against middle * scale, a product that float64 holds. Rare, and farther by at most 2^-23 |x|."""
    fmt = FloatFormat.parse(name)
    lattice = fmt.lattice[fmt.lattice >= 0].double()
    middles = (lattice[1:] + lattice[:-1]) / 2
    count = 100_000
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(count, 1, generator=generator) + 1
    bell = torch.randn(count, 1, generator=generator) * fmt.lattice_max / 3 * scale
    at_middle = (middles[torch.randint(len(middles), (count, 1), generator=generator)] * scale).float()

    def farther(x: Tensor) -> tuple[int, float]:
        """How many are not on the nearest level, and by how much more they err than it does, relative to x."""
        codes = OPS.quantize(x, [1, 1], scale, name)
        levels = (lattice[:, None] * scale[:, 0].double()).T
        least = (levels - x.double().abs()).abs().amin(1, keepdim=True)
        found = (fmt.decode(codes).abs().double() * scale.double() - x.double().abs()).abs()
        excess = (found - least) / x.double().abs()
        return int((excess > 0).sum()), float(excess.max())

    assert farther(bell)[0] <= 2
    assert farther(at_middle)[1] <= 2**-23


# --- graphs ----------------------------------------------------------------------------------------------------------


@each_dtype
def test_compiled_dynamic_graphs_agree_bit_for_bit(dtype: torch.dtype) -> None:
    """One graph for every size of every dimension; also where a size of 1 makes it a graph of its own."""

    def forward(x: Tensor) -> list[Tensor]:
        token, group = chain(x, [1, 1, -1], "e2m3"), chain(x, [1, 1, 16], "e2m1", torch.float16)
        # the product in float32: Inductor does not round half-precision intermediates, which is not ours to test
        rounded = FloatFormat.parse("e2m3").round(x.float() * 20)
        return [*token, *group, *chain(x, [-1, -1, -1], "e3m0"), rounded]

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for shape in [(2, 7, 64), (3, 5, 96), *([(1, 9, 64)] if dtype == torch.float32 else [])]:
        x = normal(*shape, dtype=dtype, seed=sum(shape))
        x[0, 0] = 0
        for ours, theirs in zip(compiled(x), forward(x), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_blocks_may_be_symbols() -> None:
    """A token's block as the size itself instead of -1, and as half of it, where that size is dynamic."""

    def forward(x: Tensor) -> list[Tensor]:
        features = x.shape[-1]
        return [*chain(x, [1, 1, features], "e2m3"), *chain(x, [1, 1, features // 2], "e2m1")]

    compiled = torch.compile(forward, fullgraph=True, dynamic=True)
    for shape in [(2, 7, 64), (3, 5, 96)]:
        x = normal(*shape)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled(x), forward(x), strict=True))


def test_exported_graphs_keep_the_ops_and_any_size() -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return chain(x, [1, 1, -1], "e2m3")[2]

    auto = torch.export.Dim.AUTO
    exported = torch.export.export(Module(), (normal(2, 3, 64),), dynamic_shapes=({0: auto, 1: auto},))
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert targets == [f"fp4dit_ao.{name}.default" for name in ("choose_scale", "quantize", "dequantize")]
    for shape in [(5, 7, 64), (1, 1, 64)]:
        x = normal(*shape)
        assert torch.equal(exported.module(check_guards=False)(x), Module()(x))


def test_opcheck() -> None:
    x = normal(4, 64, dtype=torch.bfloat16)
    scale, codes, _ = chain(x, [1, 32], "e2m1")
    torch.library.opcheck(OPS.choose_scale.default, (x, [1, 32], "e2m1", torch.float16))
    torch.library.opcheck(OPS.quantize.default, (x, [1, 32], scale, "e2m1"))
    torch.library.opcheck(OPS.dequantize.default, (codes, [1, 32], scale, "e2m1", torch.bfloat16))


@each_dtype
def test_fake_tensors_have_the_shapes_and_types(dtype: torch.dtype) -> None:
    real = chain(normal(2, 3, 64, dtype=dtype), [1, 1, 16], "e2m1", torch.float16)
    with FakeTensorMode():
        fake = chain(torch.empty(2, 3, 64, dtype=dtype), [1, 1, 16], "e2m1", torch.float16)
    assert [(f.shape, f.dtype) for f in fake] == [(r.shape, r.dtype) for r in real]


def test_meta_tensors() -> None:
    scale, codes, dequantized = chain(torch.empty(4, 64, device="meta"), [1, 32], "e2m1")
    assert (scale.shape, codes.shape, dequantized.shape) == ((4, 2), (4, 64), (4, 64))
    assert codes.is_meta


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_name
@each_dtype
def test_cuda_agrees_with_cpu(name: str, dtype: torch.dtype) -> None:
    x = normal(16, 256, dtype=dtype)
    x[3] = 0
    for block_size in ([1, -1], [1, 128], [-1, -1]):
        expected = chain(x, block_size, name)
        found = chain(x.cuda(), block_size, name)
        assert all(torch.equal(f.cpu(), e) for f, e in zip(found, expected, strict=True))


def test_gradients_reach_only_the_scale() -> None:
    """Codes are integers: the ops alone pass to x what the scale passes on, to its block's largest element.

    The straight-through gradient is the observers' (``StraightThrough``), not the ops'.
    """
    x = torch.tensor([[1.0, -3.0, 0.5, 2.0], [4.0, 1.0, 1.0, 1.0]], requires_grad=True)
    scale, codes, dequantized = chain(x, [1, -1], "e2m1")
    assert scale.requires_grad and not codes.requires_grad and dequantized.requires_grad
    dequantized.sum().backward()
    levels = FloatFormat.parse("e2m1").decode(codes).sum(1) / 12
    assert torch.allclose(x.grad, torch.tensor([[0, -levels[0], 0, 0], [levels[1], 0, 0, 0]]))


# --- wrong input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block_size", "message"),
    [
        ([1, 5], r"a block of 5 does not divide dimension 1 of shape \(4, 64\)"),
        ([1, 128], r"a block of 128 does not divide dimension 1"),
        ([0, 64], r"a block of 0 does not divide dimension 0"),
        ([1, -2], r"a block of -2 does not divide dimension 1"),
        ([-1], r"block_size \[-1\] has 1 entries for a tensor of rank 2"),
        ([1, 1, 64], r"has 3 entries for a tensor of rank 2"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(block_size: list[int], message: str) -> None:
    x = normal(4, 64)
    with pytest.raises(ValueError, match=message):
        OPS.choose_scale(x, block_size, "e2m1", torch.float32)
    with pytest.raises(ValueError, match=message):
        OPS.quantize(x, block_size, torch.ones(4, 1), "e2m1")
    with pytest.raises(ValueError, match=message):
        OPS.dequantize(x.to(torch.uint8), block_size, torch.ones(4, 1), "e2m1", torch.float32)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 4), (1, 8), (4, 2, 1), ()])
def test_scales_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    """Also one with the right number of scales in the wrong places."""
    with pytest.raises(ValueError, match=r"does not fit: expected \(4, 2\) for block_size \[1, 32\]"):
        OPS.quantize(normal(4, 64), [1, 32], torch.ones(shape), "e2m1")


def test_unknown_formats_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown number format 'fp4'"):
        OPS.choose_scale(normal(4, 64), [1, -1], "fp4", torch.float32)


@pytest.mark.parametrize("fmt", ["e2m3", "e3m4", "e3m0", "int6", "e4m3fn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [[1, 1, -1], [-1, -1, -1], [1, 1, 8]])
def test_fake_quantize_is_both_steps(fmt: str, dtype: torch.dtype, block_size: list[int]) -> None:
    x = (torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    x[0, 0, 0], x[1, 1] = torch.nan, 0.0
    scale = OPS.choose_scale(x.nan_to_num(), block_size, fmt, torch.float32)
    both = OPS.dequantize(OPS.quantize(x, block_size, scale, fmt), block_size, scale, fmt, dtype)
    assert torch.equal(OPS.fake_quantize(x, block_size, scale, fmt, dtype), both)
    compiled = torch.compile(lambda x, scale: OPS.fake_quantize(x, block_size, scale, fmt, dtype), backend="aot_eager")
    assert torch.equal(compiled(x, scale), both)


@pytest.mark.parametrize("tag", ["", "mine"])
def test_compiled_graphs_of_another_version_are_not_taken_from_a_cache(tag: str) -> None:
    show = "import torch, fp4dit_ao.ops; print(repr(torch.compiler.config.cache_key_tag))"
    environment = os.environ | {"TORCH_COMPILE_CACHE_KEY_TAG": tag}
    printed = subprocess.run([sys.executable, "-c", show], env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == repr(f"{tag} fp4dit_ao {fp4dit_ao.__version__}".strip())
