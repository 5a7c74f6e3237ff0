"""The compiled kernel: exact on every instruction set of this machine, at every shape, type and table."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd

from benchmarks import tokens as benchmark
from fp4dit_ao import FloatFormat, MinifloatTensor
from fp4dit_ao.kernels import int8_linear as int8_products
from fp4dit_ao.kernels import token_quantization
from fp4dit_ao.kernels.cpu import int8_linear, native
from fp4dit_ao.ops import choose_scale

E3M0 = [0, 1, 2, 4, 8, 16, 32, 64, 0, -1, -2, -4, -8, -16, -32, -64]
WILD = [127, -127, 3, -5, 7, 126, -126, 1, 0, 99, -98, 64, -64, 2, -2, 33]


@functools.cache
def instruction_sets(group: int = 64) -> list[str]:
    return [name for name in native.kernels() if name != "amx" or group % 64 == 0]


def problem(
    rows: int, features: int, depth: int, group: int, seed: int = 0, shared_scale: bool = False, digits: int = 1
) -> dict:
    g = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(-127, 128, (digits * rows, depth), generator=g, dtype=torch.int8),
        "token_scale": torch.rand(rows, 1, generator=g) + 0.01,
        "qdata": torch.randint(0, 256, (features, depth // 2), generator=g, dtype=torch.uint8),
        "scale": torch.rand(1 if shared_scale else features, depth // group, generator=g) + 0.01,
        "table": WILD,
        "bias": torch.randn(features, generator=g),
        "output_dtype": torch.float32,
        "digits": digits,
    }


def oracle(p: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The product in float64, and the sum of its terms' magnitudes."""
    codes = torch.stack([p["qdata"] & 15, p["qdata"] >> 4], -1).flatten(1).long()
    levels = torch.tensor(p["table"], dtype=torch.float64)[codes]
    weight = (levels.unflatten(1, (p["scale"].shape[1], -1)) * p["scale"].double()[..., None]).flatten(1)
    digits = p["tokens"].unflatten(0, (p["digits"], -1)).double()
    x = sum(digit * 128.0**power for power, digit in enumerate(reversed(digits))) * p["token_scale"].double()
    bias = torch.zeros(()) if p["bias"] is None else p["bias"].double()
    return x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()


def check(p: dict) -> None:
    exact, magnitude = oracle(p)
    for kernel in instruction_sets(p["tokens"].shape[1] // p["scale"].shape[1]):
        y = int8_linear.run(**p, kernel=kernel)
        assert ((y - exact).abs() <= 1e-6 * magnitude + 1e-30).all(), kernel


def test_this_machine_has_the_portable_kernel_and_a_library() -> None:
    assert native.shared_object() is not None
    assert instruction_sets()[-1] == "portable"


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 239, 241, 500])
@pytest.mark.parametrize("digits", [1, 2, 3])
def test_every_number_of_rows(rows, digits) -> None:
    check(problem(rows, 70, 256, 128, digits=digits))


@pytest.mark.parametrize(
    ("features", "depth", "group"),
    [
        (1, 128, 128),
        (63, 64, 16),
        (64, 96, 32),
        (65, 448, 112),
        (130, 24, 8),
        (5, 12, 4),
        (64, 1536, 1536),
        (64, 1200, 600),
        (64, 1152, 128),  # nine groups, three at a time
        (66, 704, 64),  # eleven: six, then five
        (40, 640, 16),  # forty: fourteen, fourteen, twelve
        (70, 60, 20),  # groups that are padded
    ],
)
@pytest.mark.parametrize("shared_scale", [False, True])
def test_every_layout(features, depth, group, shared_scale) -> None:
    for digits in (1, 2):
        check(problem(9, features, depth, group, shared_scale=shared_scale, digits=digits))


@settings(max_examples=60)
@given(
    rows=st.integers(1, 30), features=st.integers(1, 140), groups=st.integers(1, 6), fours=st.integers(1, 40),
    seed=st.integers(0, 2**31), table=st.lists(st.integers(-127, 127), min_size=16, max_size=16), bias=st.booleans(),
    digits=st.integers(1, 3),
)  # fmt: skip
def test_wild_problems(rows, features, groups, fours, seed, table, bias, digits) -> None:
    p = problem(rows, features, groups * fours * 4, fours * 4, seed, digits=digits)
    check(p | {"table": table, "bias": p["bias"] if bias else None})


def test_the_worst_sums_do_not_overflow() -> None:
    p = problem(7, 66, 1024, 1024)
    for sign in (-127, 127):
        check(p | {"tokens": torch.full((7, 1024), sign, dtype=torch.int8), "table": [127] * 16})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("features", "lower"),
    [
        (1, [0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xF000, 0xFFFF]),
        (64, [0x7FFF, 0x8000, 0x8001]),  # whole panels, too many for a cache
    ],
)
def test_half_outputs_round_to_nearest_even_everywhere(dtype, features, lower) -> None:
    """Every upper half of a float32, with lower halves at and beside the ties; a token of one 1 makes the output its scale."""
    upper = torch.arange(2**16, dtype=torch.int64) << 16
    lower = torch.tensor(lower)
    value = (upper[:, None] + lower).to(torch.uint32).view(torch.float32).reshape(-1, 1)
    p = {
        "tokens": torch.tensor([[1, 0, 0, 0]], dtype=torch.int8).expand(len(value), 4),
        "token_scale": value, "qdata": torch.tensor([[1, 0]], dtype=torch.uint8).repeat(features, 1),
        "scale": torch.ones(features, 1), "table": E3M0, "bias": None,
    }  # fmt: skip
    expected = value.to(dtype).expand(-1, features)
    for kernel in instruction_sets(group=4):
        got = int8_linear.run(**p, output_dtype=dtype, kernel=kernel)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0)), kernel


@pytest.mark.parametrize("features", [1152, 1216, 1160])
def test_outputs_too_large_for_a_cache(features) -> None:
    p = problem(2050, features, 128, 128)
    for kernel in instruction_sets():
        wide = int8_linear.run(**p, kernel=kernel)
        assert torch.equal(int8_linear.run(**(p | {"output_dtype": torch.bfloat16}), kernel=kernel), wide.bfloat16()), (
            kernel
        )


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_rows_are_shared_among_any_number_of_threads(threads) -> None:
    """However rows are cut into blocks, every row is computed once, and to the same bits as alone."""
    p = problem(1700, 130, 256, 128)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        whole = int8_linear.run(**p)
    finally:
        torch.set_num_threads(before)
    for row in (0, 191, 192, 858, 1031, 1032, 1699):
        one = p | {name: p[name][row : row + 1] for name in ("tokens", "token_scale")}
        assert torch.equal(int8_linear.run(**one)[0], whole[row])


def test_threads_and_strides_change_no_bit() -> None:
    p = problem(481, 200, 256, 128)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = int8_linear.run(**p)
        torch.set_num_threads(4)
        assert torch.equal(int8_linear.run(**p), alone)
    finally:
        torch.set_num_threads(threads)
    columns = {name: p[name].T.contiguous().T for name in ("tokens", "qdata", "scale")}
    assert torch.equal(int8_linear.run(**(p | columns)), alone)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qdata": torch.zeros(70, 100, dtype=torch.uint8)}, "qdata has rows of 100 bytes; expected 128, for the 256"),
        ({"qdata": torch.zeros(70, 128)}, "qdata has torch.float32; expected torch.uint8"),
        ({"qdata": torch.zeros(128, dtype=torch.uint8)}, r"qdata has shape \(128,\); expected two dimensions"),
        ({"scale": torch.ones(3, 2)}, "scale has 3 rows; expected 1 or 70"),
        (
            {"scale": torch.ones(70, 3)},
            "scale has 3 groups; expected a number that cuts 256 features into multiples of 4",
        ),
        ({"scale": torch.ones(70, 0)}, "scale has 0 groups"),
        ({"scale": torch.ones(70, 128)}, "scale has 128 groups"),
        ({"token_scale": torch.ones(2, 1)}, "token_scale has 2 scales; expected 9"),
        ({"bias": torch.ones(69)}, r"bias has shape \(69,\); expected \(70,\)"),
        ({"table": [0] * 15}, r"table has \[0, .*\]; expected sixteen levels within \+-127"),
        ({"table": [-128] * 16}, r"table has \[-128, .*\]; expected sixteen levels within \+-127"),
        ({"tokens": torch.zeros(9, 256)}, "tokens has torch.float32; expected torch.int8"),
        ({"output_dtype": torch.float64}, "output_dtype has torch.float64; expected one of torch.float32"),
        ({"digits": 0}, "digits has 0; expected 1 to 3"),
        ({"digits": 2}, "token_scale has 9 scales; expected 4.5, for 9 rows of 2 digits"),
        ({"digits": 4, "tokens": torch.zeros(36, 256, dtype=torch.int8)}, "digits has 4; expected 1 to 3"),
        ({"kernel": "mmx"}, "kernel has 'mmx'; expected one of .*portable"),
        (
            {"tokens": torch.zeros(9, 0, dtype=torch.int8), "qdata": torch.zeros(70, 0, dtype=torch.uint8)},
            "scale has 2 groups; expected a number that cuts 0 features",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message) -> None:
    with pytest.raises(ValueError, match=f"^int8_linear: {message}"):
        int8_linear.run(**(problem(9, 70, 256, 128) | change))


def test_no_rows() -> None:
    assert int8_linear.run(**problem(0, 70, 256, 128)).shape == (0, 70)
    assert int8_linear.run(**problem(0, 70, 256, 128, digits=2)).shape == (0, 70)


@pytest.mark.parametrize("fmt", ["e2m1", "e3m0", "e1m2", "e1m1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_linear_computes_the_same_without_the_library(fmt, dtype, monkeypatch) -> None:
    torch.manual_seed(0)
    weight = MinifloatTensor.from_hp(torch.randn(70, 256, dtype=dtype), [1, 128], fmt, "e2m3")
    x, bias = torch.randn(2, 5, 256, dtype=dtype), torch.randn(70, dtype=dtype)
    fast = torch.nn.functional.linear(x, weight, bias)
    monkeypatch.setattr(native, "shared_object", lambda: None)
    slow = torch.nn.functional.linear(x, weight, bias)
    assert fast.dtype == slow.dtype == dtype
    # float32 sums in another order, which may round to the half beside
    rtol, atol = (torch.finfo(dtype).eps, 1e-4) if dtype.itemsize < 4 else (0, 1e-5)
    assert torch.allclose(fast.float(), slow.float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("found", "reason"), [("nothing", "installed without"), ("rubbish", "invalid ELF|file too short|not a")]
)
def test_a_missing_library_is_said_once(found, reason, monkeypatch, tmp_path) -> None:
    (tmp_path / "rubbish.so").write_bytes(b"rubbish")
    monkeypatch.setattr(native, "_candidates", lambda: [tmp_path / "rubbish.so"] if found == "rubbish" else [])
    native.shared_object.cache_clear()
    try:
        with pytest.warns(UserWarning, match=rf"no compiled kernel \(.*({reason}).* Install gcc"):
            assert native.shared_object() is None
        assert native.kernels() == {}
        assert not int8_linear.supports(torch.device("cpu"), 4, 128)
    finally:
        native.shared_object.cache_clear()


def test_a_library_of_another_version_is_not_used(monkeypatch) -> None:
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    native.shared_object.cache_clear()
    try:
        with pytest.warns(UserWarning, match="of another version"):
            assert native.shared_object() is None
    finally:
        native.shared_object.cache_clear()


def test_compiled_with_dynamic_rows() -> None:
    torch.manual_seed(0)
    weights = [MinifloatTensor.from_hp(torch.randn(96, 128), [1, 128], fmt, "e2m3") for fmt in ("e2m1", "e3m0", "e1m2")]

    def qkv(x):
        return [torch.nn.functional.linear(torch.nn.functional.gelu(x), weight) for weight in weights]

    compiled = torch.compile(qkv, fullgraph=True, dynamic=True)
    for rows in (4, 7):
        x = torch.randn(rows, 128)
        for got, expected in zip(compiled(x), qkv(x), strict=True):
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_compiled_linears_that_read_the_same_value_quantize_it_once() -> None:
    torch.manual_seed(0)
    weights = [MinifloatTensor.from_hp(torch.randn(96, 128), [1, 128], "e2m1", "e2m3") for _ in range(3)]

    def model(x):
        first = [torch.nn.functional.linear(x, weight) for weight in weights]
        x.mul_(torch.tensor([1.0, -2.0]).repeat(64))  # another value from here on
        return first + [torch.nn.functional.linear(x, weight) for weight in weights]

    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    x = torch.randn(4, 128)
    expected = model(x.clone())
    with torch.no_grad():
        for got, wanted in zip(compiled(x.clone()), expected, strict=True):
            assert torch.equal(got, wanted)
    (graph,) = graphs
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.fp4dit_ao.int8_linear.default) == 6
    assert targets.count(torch.ops.aten.amax.default) == 2


@pytest.mark.parametrize("digits", [1, 3])
def test_the_operators_match_their_fakes(digits: int) -> None:
    p = problem(5, 70, 256, 128, digits=digits)
    args = (p["tokens"], p["token_scale"], p["qdata"], p["scale"], WILD, p["bias"], torch.bfloat16, digits)
    torch.library.opcheck(torch.ops.fp4dit_ao.int8_linear.default, args)
    heads = torch.randn(2, 9, 3, 72).transpose(1, 2)
    torch.library.opcheck(torch.ops.fp4dit_ao.int8_tokens.default, (heads, {1: "e2m3", 3: "e4m3"}[digits]))


def test_products_on_operators_are_the_specification() -> None:
    p = problem(33, 70, 256, 64)
    x = torch.randn(33, 256)
    fmt = FloatFormat.parse("e2m3")
    token_scale = choose_scale(x, [1, -1], "e2m3", torch.float32)
    tokens = fmt.round(x / token_scale).to(torch.int8)
    codes = torch.stack([p["qdata"] & 15, p["qdata"] >> 4], -1).flatten(1)
    levels = torch.tensor(WILD, dtype=torch.int8)[codes.long()]
    expected = int8_products.group_products(tokens, levels, p["scale"]) * token_scale
    got = int8_linear.run(tokens, token_scale, p["qdata"], p["scale"], WILD, None, torch.float32)
    assert torch.allclose(got, expected, rtol=1e-5, atol=1e-4)


# --- tokens ----------------------------------------------------------------------------------------------------------


def _both(x: torch.Tensor, fmt: str) -> None:
    """The compiled loop and the operators it stands for, to the bit."""
    levels, scale = token_quantization.compiled_tokens(x, fmt)
    expected, expected_scale = token_quantization.operator_tokens(x, fmt)
    assert torch.equal(levels, expected)
    assert torch.equal(scale.view(torch.int32), expected_scale.view(torch.int32)) or scale.isnan().any()
    assert torch.equal(scale.isnan(), expected_scale.isnan())


@pytest.mark.parametrize(
    "fmt", ["e2m3", "int8", "int6", "e1m4", "e2m1", "e1m2", "e2m2", "e3m4", "e4m3", "e3m3", "e4m2", "e2m4"]
)
@pytest.mark.parametrize("dtype", list(native.OUTPUTS), ids=str)
def test_compiled_tokens_are_the_operators_tokens(fmt: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.int16)
    dense = torch.linspace(-1, 1, 60 * 16 + 1)[None] * 60  # every middle between levels
    for x in (
        torch.randn(33, 1153, generator=generator),
        torch.randn(33, 40, generator=generator) * torch.logspace(-30, 30, 40),
        every.view(torch.bfloat16).float().reshape(256, 256),  # with its infinities, NaN and subnormals
        every.view(torch.float16).float().reshape(-1, 64),
        torch.cat([dense, dense * torch.finfo(torch.float32).tiny]),
        torch.zeros(2, 7), torch.ones(0, 8), torch.ones(3, 1),
    ):  # fmt: skip
        _both(x.to(dtype), fmt)


@pytest.mark.parametrize("fmt", ["e2m3", "int8", "int6", "e1m2", "e3m4", "e4m3"])
@pytest.mark.parametrize(("dtype", "mantissa"), [(torch.bfloat16, 7), (torch.float16, 10)], ids=str)
def test_multiplying_by_the_inverse_divides_exactly(fmt: str, dtype: torch.dtype, mantissa: int) -> None:
    """Every absmax of a binade, with every number from there down to what rounds to 0: the quotients' all significands."""
    absmax = 2.0 - torch.arange(2**mantissa) / 2**mantissa
    below = torch.cat([absmax * 2.0**-binade for binade in range(10)])
    for rows in absmax.split(128):
        _both(torch.cat([rows[:, None], torch.minimum(below, rows[:, None])], 1).to(dtype), fmt)


@settings(derandomize=True)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40), st.sampled_from(["e2m3", "int8", "e1m2", "e3m4", "e4m3"])
)
def test_compiled_tokens_of_wild_floats(values: list[float], fmt: str) -> None:
    _both(torch.tensor([values]), fmt)


@pytest.mark.parametrize("rows", [1, 300])
def test_compiled_graphs_quantize_large_tensors_in_the_loop(rows: int) -> None:
    torch.compiler.reset()
    x = torch.randn(300, 512)
    expected = token_quantization.compiled_tokens(x[:rows] + 1, "e2m3")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        got = torch.compile(lambda x: token_quantization.quantize_tokens(x + 1, "e2m3"))(x[:rows])
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert ("fp4dit_ao::int8_tokens" in {event.key for event in trace.key_averages()}) == (rows == 300)


def test_the_benchmark_of_tokens_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    benchmark.main(count=2, rounds=1, threads=torch.get_num_threads())  # it compares levels, too
    assert [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines()[2:6]] == list(benchmark.BEFORE)


def test_the_loops_operator_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 300)
    expected = torch.ops.fp4dit_ao.int8_tokens(x, "e2m3")
    monkeypatch.setattr(native, "shared_object", lambda: None)
    for got, value in zip(torch.ops.fp4dit_ao.int8_tokens(x, "e2m3"), expected, strict=True):
        assert torch.equal(got, value)


@pytest.mark.parametrize("fmt", ["e2m3", "e3m4"])
def test_compiled_tokens_take_any_layout(fmt: str) -> None:
    for features in (1, 5, 15, 16, 17, 63, 64, 72, 96, 130):
        x = torch.randn(3, 5, 7, features)
        for view in (
            x, x[0, 0], x[0, 0, 0], x.transpose(1, 2), x.transpose(0, 2), x[:, ::2], x[:, :, 1:], x[..., ::3],
            x.expand(2, 3, 5, 7, features), x[:, :1].expand(3, 5, 7, features), torch.nn.Parameter(x),
        ):  # fmt: skip
            assert token_quantization.TOKENS.pick(token_quantization._operands(view, fmt)).name == "compiled loop"
            _both(view, fmt)
