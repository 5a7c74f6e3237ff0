"""The linear with codebook groups: the same bits on every instruction set of this machine as on PyTorch's operators."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4dit_ao.formats import pack, parse
from fp4dit_ao.kernels import codebook_linear, quantized_codebook_linear, token_quantization
from fp4dit_ao.kernels.codebook_linear import MOST_FEATURES, reference_codebook_linear, run
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.token_quantization import add_digits, quantize_tokens

OUTPUTS = list(native.OUTPUTS)
Problem = dict[str, Any]


@functools.cache
def instruction_sets(group: int, largest: int = 127) -> list[str]:
    """Kernels that take such groups and levels of tokens: tiles of AMX are looked up 32 input features at a time, and 16 bits
    hold AVX2's sums of two products for small levels only."""
    return [
        kernel
        for kernel in codebook_linear.kernels()
        if (kernel != "amx" or group % 32 == 0) and (kernel != "avx2" or largest <= 64)
    ]


def problem(
    rows: int,
    features: int,
    groups: int,
    group: int,
    seed: int = 0,
    digits: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    g = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(-127, 128, (digits * rows, groups * group), generator=g, dtype=torch.int8),
        "token_scale": torch.rand(rows, 1, generator=g) + 0.01,
        "qdata": torch.randint(0, 256, (features, groups * group // 2), generator=g, dtype=torch.uint8),
        "index": torch.randint(0, 256, (features, (groups + 1) // 2), generator=g, dtype=torch.uint8),
        "codebooks": torch.randint(-127, 128, (16, 16), generator=g, dtype=torch.int8),
        "row_scale": torch.rand(features, generator=g) + 0.01,
        "bias": torch.randn(features, generator=g),
        "output_dtype": dtype,
        "digits": digits,
        "group_size": group,
    }


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def check(p: Problem) -> torch.Tensor:
    """Every kernel against the specification, to the bit: with these tokens, and with levels of half their size."""
    results = []
    for largest, tokens in ((127, p["tokens"]), (64, p["tokens"] // 2)):
        halved = p | {"tokens": tokens}
        expected = reference_codebook_linear(**halved)
        for kernel in [None, *instruction_sets(p["group_size"], largest)]:
            got = run(**halved, kernel=kernel)
            assert got.dtype == p["output_dtype"]
            assert torch.equal(bits(got), bits(expected)), (kernel, largest)
        results.append(expected)
    return results[0]


def oracle(p: Problem) -> torch.Tensor:
    """The product in float64, code by code."""
    codes = torch.stack([p["qdata"] & 15, p["qdata"] >> 4], -1).flatten(1).long()
    books = torch.stack([p["index"] & 15, p["index"] >> 4], -1).flatten(1).long()
    weight = torch.zeros(codes.shape, dtype=torch.float64)
    for k in range(codes.shape[1]):
        weight[:, k] = p["codebooks"][books[:, k // p["group_size"]], codes[:, k]].double()
    y = add_digits(p["tokens"].double(), p["digits"]) @ weight.T * p["token_scale"].double() * p["row_scale"].double()
    return y if p["bias"] is None else y + p["bias"].double()


def test_this_machine_has_the_library_and_the_portable_kernel() -> None:
    assert list(codebook_linear.kernels())[-1] == "portable"


@pytest.mark.parametrize("digits", [1, 2, 3])
@pytest.mark.parametrize(("features", "groups", "group"), [(5, 3, 4), (33, 5, 32), (7, 2, 128)])
def test_the_specification_is_the_product(features: int, groups: int, group: int, digits: int) -> None:
    p = problem(3, features, groups, group, digits=digits)
    for bias in (p["bias"], None):
        expected = oracle(p | {"bias": bias})
        got = reference_codebook_linear(**(p | {"bias": bias})).double()
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.skipif("amx" not in codebook_linear.kernels(), reason="the processor or the system has no amx_int8")
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 32, 33, 48, 700])
@pytest.mark.parametrize("digits", [1, 2])
def test_amx_at_every_filling_of_its_tiles(rows: int, digits: int) -> None:
    for features, groups, group in ((16, 1, 32), (17, 3, 32), (31, 3, 96), (65, 9, 128), (32, 2, 64)):
        p = problem(rows, features, groups, group, digits=digits, dtype=torch.bfloat16)
        assert torch.equal(bits(run(**p, kernel="amx")), bits(reference_codebook_linear(**p)))


def test_amx_is_found_where_the_processor_has_it() -> None:
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    if "amx_int8" not in flags or "avx512_bf16" not in flags:
        pytest.skip("the processor has no amx_int8")
    assert next(iter(codebook_linear.kernels())) == "amx"


@settings(max_examples=60)
@given(
    rows=st.integers(1, 70), features=st.integers(1, 100), groups=st.integers(1, 9),
    group=st.sampled_from([4, 8, 12, 20, 32, 36, 64, 96, 128, 256]), seed=st.integers(0, 2**31), digits=st.integers(1, 3),
    dtype=st.sampled_from(OUTPUTS), bias=st.booleans(),
)  # fmt: skip
def test_wild_problems(
    rows: int, features: int, groups: int, group: int, seed: int, digits: int, dtype: torch.dtype, bias: bool
) -> None:
    p = problem(rows, features, groups, group, seed, digits, dtype)
    check(p if bias else p | {"bias": None})


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (1, 101, 11, 32), (13, 37, 7, 64), (41, 67, 3, 128), (9, 31, 1, 1152)])
@pytest.mark.parametrize("dtype", OUTPUTS, ids=str)
def test_prime_sizes_and_single_rows(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    for digits in (1, 2, 3):
        check(problem(*shape, digits=digits, dtype=dtype))


@pytest.mark.parametrize(("token", "level"), itertools.product((-127, 127), repeat=2))
def test_the_largest_sums_neither_overflow_nor_saturate(token: int, level: int) -> None:
    p = problem(3, 5, MOST_FEATURES // 128, 128)
    p |= {"tokens": torch.full_like(p["tokens"], token), "codebooks": torch.full((16, 16), level, dtype=torch.int8)}
    p |= {"token_scale": torch.ones(3, 1), "row_scale": torch.ones(5), "bias": None}
    assert (check(p) == float(token * level * MOST_FEATURES)).all()


def test_levels_of_minus_128_are_exact() -> None:
    p = problem(3, 5, 4, 32)
    check(p | {"codebooks": torch.full((16, 16), -128, dtype=torch.int8), "tokens": torch.full_like(p["tokens"], 127)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [3, 32])
def test_half_outputs_round_to_nearest_even_everywhere(dtype: torch.dtype, features: int) -> None:
    """Every upper half of a float32, with lower halves at and beside the ties; a token of one 1 makes the output its scale."""
    lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF])
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    value = (upper[:, None] + lower).to(torch.uint32).view(torch.float32).reshape(-1, 1)
    one = torch.zeros(1, 32, dtype=torch.int8)
    one[0, 0] = 1
    p = problem(1, features, 1, 32, dtype=dtype)
    p |= {"tokens": one.expand(len(value), 32).contiguous(), "token_scale": value, "bias": None}
    p |= {"codebooks": torch.ones(16, 16, dtype=torch.int8), "row_scale": torch.ones(features)}
    expected = value.to(dtype).expand(-1, features)
    for kernel in instruction_sets(32, largest=1):
        got = run(**p, kernel=kernel)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(bits(got.nan_to_num(7.0)), bits(expected.nan_to_num(7.0))), kernel


def test_outputs_too_large_for_a_cache() -> None:
    p = problem(2050, 1152, 1, 128)
    for dtype in OUTPUTS:
        expected = reference_codebook_linear(**(p | {"output_dtype": dtype}))
        for kernel in (None, "portable"):
            assert torch.equal(run(**(p | {"output_dtype": dtype}), kernel=kernel), expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    p = problem(1100, 130, 3, 128)
    expected = reference_codebook_linear(**p)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for kernel in instruction_sets(128)[:2]:
            for rows in (1, 40, 1100):
                few = p | {name: p[name][:rows] for name in ("tokens", "token_scale")}
                assert torch.equal(run(**few, kernel=kernel), expected[:rows])
    finally:
        torch.set_num_threads(before)


def test_strides_and_types_of_scales_change_no_bit() -> None:
    p = problem(19, 40, 3, 64)
    expected = run(**p)
    columns = {name: p[name].T.contiguous().T for name in ("tokens", "qdata", "index", "codebooks")}
    spread = {name: p[name].repeat_interleave(2, 0)[::2] for name in ("token_scale", "row_scale", "bias")}
    assert torch.equal(run(**(p | columns | spread)), expected)
    flat = {"token_scale": p["token_scale"].flatten(), "row_scale": p["row_scale"][:, None]}
    assert torch.equal(run(**(p | flat)), expected)
    half = {name: p[name].bfloat16() for name in ("row_scale", "bias")}
    assert torch.equal(run(**(p | half)), reference_codebook_linear(**(p | {n: x.float() for n, x in half.items()})))


@pytest.mark.parametrize("digits", [1, 2])
def test_nothing_to_compute(digits: int) -> None:
    assert check(problem(0, 70, 2, 128, digits=digits)).shape == (0, 70)
    assert check(problem(5, 0, 2, 128, digits=digits)).shape == (5, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(9, 256)}, "tokens has torch.float32 with 2 dimensions; expected torch.int8 with 2"),
        ({"qdata": torch.zeros(70, 128, dtype=torch.int8)}, "qdata has torch.int8"),
        ({"qdata": torch.zeros(70, 100, dtype=torch.uint8)}, "qdata has rows of 100 bytes; expected two of 256 codes"),
        ({"index": torch.zeros(70, 2, dtype=torch.uint8)}, r"index has shape \(70, 2\); expected \(70, 1\)"),
        ({"codebooks": torch.zeros(8, 16, dtype=torch.int8)}, r"codebooks has shape \(8, 16\); expected \(16, 16\)"),
        ({"row_scale": torch.ones(69)}, "row_scale has 69 scales; expected one for each of 70"),
        ({"token_scale": torch.ones(8, 1)}, "token_scale has 8 scales; expected one for each of 9 rows"),
        ({"bias": torch.ones(69)}, r"bias has shape \(69,\); expected \(70,\)"),
        ({"output_dtype": torch.float64}, "output_dtype has torch.float64; expected torch.float32"),
        ({"digits": 0}, "digits has 0; expected 1 to 3"),
        ({"digits": 2}, "token_scale has 9 scales; expected one for each of 9 rows by 2 digits"),
        ({"group_size": 6}, "group_size has 6; expected a positive multiple of 4"),
        ({"group_size": 96}, "tokens has 256 input features; expected a positive multiple of the group size 96"),
    ],
)
def test_what_does_not_fit_is_refused(change: Problem, message: str) -> None:
    p = problem(9, 70, 2, 128) | change
    for call in (run, reference_codebook_linear):
        with pytest.raises(ValueError, match=f"^codebook_linear: {message}"):
            call(**p)


def test_sums_that_could_overflow_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_FEATURES}, whose sums fit into an int32"):
        run(**problem(1, 1, MOST_FEATURES // 128 + 1, 128))


@pytest.mark.skipif("amx" not in codebook_linear.kernels(), reason="the processor or the system has no amx_int8")
def test_a_kernel_that_cannot_take_a_group_says_so() -> None:
    with pytest.raises(RuntimeError, match="kernel amx cannot take groups of 4"):
        run(**problem(1, 1, 1, 4), kernel="amx")


@pytest.mark.skipif("avx2" not in codebook_linear.kernels(), reason="the processor has no AVX2")
def test_a_kernel_for_small_levels_takes_them_up_to_its_largest() -> None:
    """At the largest it is exact; one level beyond, wherever it is, it refuses, and the library takes another kernel."""
    for value in (64, -64):
        p = problem(40, 33, 9, 32)
        p |= {"tokens": torch.full_like(p["tokens"], value), "codebooks": torch.full((16, 16), 127, dtype=torch.int8)}
        check(p)
        assert torch.equal(run(**p, kernel="avx2"), reference_codebook_linear(**p))
        for place in ((0, 0), (17, 100), (39, 287)):
            tokens = p["tokens"].clone()
            tokens[place] += 1 if value > 0 else -1
            with pytest.raises(RuntimeError, match=r"kernel avx2 cannot take .* levels"):
                run(**(p | {"tokens": tokens}), kernel="avx2")
            assert torch.equal(run(**(p | {"tokens": tokens})), reference_codebook_linear(**(p | {"tokens": tokens})))
    weight = [p[name] for name in ("qdata", "index", "codebooks", "row_scale", "bias")]
    for fmt in ("e2m3", "int6", "int8", "e3m4", "e2m5", "e2m4"):
        x = torch.randn(40, 288)
        levels, scale = quantize_tokens(x, fmt)
        digits = len(levels) // 40
        if digits == 1 and levels.abs().max() <= 64:
            got = quantized_codebook_linear.run(x, fmt, *weight, torch.float32, group_size=32, kernel="avx2")
            assert torch.equal(got, run(levels, scale, *weight, torch.float32, 1, 32, kernel="avx2"))
        else:
            with pytest.raises(RuntimeError, match=r"kernel avx2 cannot take .* levels"):
                quantized_codebook_linear.run(x, fmt, *weight, torch.float32, group_size=32, kernel="avx2")


def test_the_operator_computes_the_same_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(33, 70, 3, 64, dtype=torch.bfloat16)
    fast = torch.ops.fp4dit_ao.codebook_linear(*p.values())
    monkeypatch.setattr(native, "shared_object", lambda: None)
    assert codebook_linear.kernels() == {}
    assert torch.equal(torch.ops.fp4dit_ao.codebook_linear(*p.values()), fast)


@pytest.mark.parametrize("fmt", ["e2m3", "e3m4", "e4m3"])
def test_quantized_tokens_multiply_a_packed_weight(fmt: str) -> None:
    """What tokens and weights stand for, multiplied in float64, within float32's rounding."""
    torch.manual_seed(0)
    x = torch.randn(5, 256)
    codes, books = torch.randint(0, 16, (7, 256)).byte(), torch.randint(0, 16, (7, 2)).byte()
    codebooks, row_scale = torch.randint(-120, 121, (16, 16)).to(torch.int8), torch.rand(7)
    levels, scale = quantize_tokens(x, fmt)
    count = token_quantization.digits(parse(fmt))
    y = torch.ops.fp4dit_ao.codebook_linear(
        levels, scale, pack(codes, 4), pack(books, 4), codebooks, row_scale, None, torch.float32, count
    )
    weight = codebooks[books.long().repeat_interleave(128, 1), codes.long()].double() * row_scale.double()[:, None]
    expected = add_digits(levels.double(), count) * scale.double() @ weight.T
    assert torch.allclose(y.double(), expected, rtol=1e-6)
    assert ((y - x.double() @ weight.T).norm() / y.norm()) < 0.1


@pytest.mark.parametrize("fmt", ["e2m3", "e3m4", "e4m3", "e3m0"])
@pytest.mark.parametrize("dtype", [*OUTPUTS, torch.float64], ids=str)
def test_quantizing_on_the_way_gives_the_same_bits(fmt: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    for shape, features, groups, group in (
        ((3, 47), 70, 5, 64),
        ((1,), 33, 3, 4),
        ((2, 3, 33), 32, 9, 128),
        ((0,), 5, 1, 32),
    ):
        p = problem(1, features, groups, group)
        x = torch.randn(*shape, groups * group, generator=g).to(dtype)
        weight = [p[name] for name in ("qdata", "index", "codebooks", "row_scale", "bias")]
        for view in (x, x.transpose(0, -2)):
            levels, scale = quantize_tokens(view, fmt)
            count = token_quantization.digits(parse(fmt))
            expected = torch.ops.fp4dit_ao.codebook_linear(levels, scale, *weight, torch.bfloat16, count, group)
            got = torch.ops.fp4dit_ao.quantized_codebook_linear(view, fmt, *weight, torch.bfloat16, group)
            assert torch.equal(got, expected.unflatten(0, view.shape[:-1]))


def test_quantizing_on_the_way_in_many_blocks_and_threads() -> None:
    p = problem(1, 130, 9, 128)
    x = torch.randn(2500, 1152, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight = [p[name] for name in ("qdata", "index", "codebooks", "row_scale", "bias")]
    expected = torch.ops.fp4dit_ao.codebook_linear(*quantize_tokens(x, "e2m3"), *weight, torch.float32)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for kernel in instruction_sets(128, largest=60)[:2]:
                got = quantized_codebook_linear.run(x, "e2m3", *weight, torch.float32, kernel=kernel)
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("digits", [1, 3])
def test_the_operator_matches_its_fake(digits: int) -> None:
    p = problem(5, 70, 3, 64, digits=digits, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.fp4dit_ao.codebook_linear.default, tuple(p.values()))
    weight = [p[name] for name in ("qdata", "index", "codebooks", "row_scale", "bias", "output_dtype")]
    arguments = (torch.randn(2, 5, 192), "e2m3", *weight, 64)
    torch.library.opcheck(torch.ops.fp4dit_ao.quantized_codebook_linear.default, arguments)


def test_compiled_with_dynamic_rows() -> None:
    p = problem(40, 70, 2, 128)

    def call(x: torch.Tensor) -> torch.Tensor:
        levels, scale = quantize_tokens(x, "e2m3")
        weight = [p[name] for name in ("qdata", "index", "codebooks", "row_scale", "bias")]
        return torch.ops.fp4dit_ao.codebook_linear(levels, scale, *weight, torch.float32)

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for rows in (4, 33):
        x = torch.randn(rows, 256)
        assert torch.equal(compiled(x), call(x))
