"""The Triton kernel: on a GPU if there is one, else in Triton's interpreter; and compiled for GPUs that are not there.

What the interpreter cannot show: speed, and that the compiled instructions compute what their assembly text says.
"""

import itertools
import json
import random
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fp4dit_ao.kernels
from fp4dit_ao import FloatFormat, MinifloatTensor
from fp4dit_ao.kernels.cpu import int8_linear as compiled_linear
from fp4dit_ao.kernels.cpu.int8_linear import level_table
from fp4dit_ao.kernels.cuda import int8_linear
from tests.kernels.test_native import WILD, oracle, problem

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
interpreter = pytest.importorskip("tests.kernels.interpreter")
DEVICE = interpreter.DEVICE
FORMATS = ["e2m1", "e3m0", "e1m2", "e1m1"]


@pytest.fixture(scope="module")
def kernel():
    return interpreter.loaded("triton_linear")


def run(kernel, p: dict, **more) -> torch.Tensor:
    of_one_digit = {name: value for name, value in p.items() if name != "digits"}  # the kernel knows no other
    on_device = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in of_one_digit.items()}
    on_device["weight"] = on_device.pop("qdata")
    return kernel.run(**on_device, **more).cpu()


def check(kernel, p: dict, **more) -> None:
    exact, magnitude = oracle(p)
    assert ((run(kernel, p, **more) - exact).abs() <= 1e-6 * magnitude + 1e-30).all()


@pytest.mark.parametrize(
    ("rows", "features", "depth", "group"),
    [
        (1, 1, 128, 128),
        (5, 70, 256, 128),
        (33, 65, 448, 112),
        (130, 130, 96, 32),
        (17, 3, 48, 16),
        (9, 9, 24, 8),
        (2, 9, 12, 6),
        (7, 66, 512, 512),
        (3, 5, 1200, 600),
        (4, 4, 320, 160),
        (600, 200, 128, 64),
    ],
)
@pytest.mark.parametrize("shared_scale", [False, True])
def test_every_layout(kernel, rows, features, depth, group, shared_scale) -> None:
    check(kernel, problem(rows, features, depth, group, shared_scale=shared_scale))


@settings(max_examples=30)
@given(
    rows=st.integers(1, 40), features=st.integers(1, 100), groups=st.integers(1, 4), pairs=st.integers(1, 80),
    seed=st.integers(0, 2**31), table=st.lists(st.integers(-127, 127), min_size=16, max_size=16), bias=st.booleans(),
)  # fmt: skip
def test_wild_problems(kernel, rows, features, groups, pairs, seed, table, bias) -> None:
    p = problem(rows, features, groups * pairs * 2, pairs * 2, seed)
    check(kernel, p | {"table": table, "bias": p["bias"] if bias else None})


def test_every_configuration(kernel) -> None:
    p = problem(150, 140, 256, 128)
    for config in {config for configs in kernel.CONFIGS.values() for config in configs}:
        check(kernel, p, config=config)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("output_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
def test_every_type(kernel, scale_dtype, output_dtype, bias_dtype) -> None:
    p = problem(19, 37, 256, 128)
    p["token_scale"] *= 1e-4  # within float16
    p |= {"scale": p["scale"].to(scale_dtype), "bias": None if bias_dtype is None else p["bias"].to(bias_dtype)}
    exact, magnitude = oracle(p)
    y = run(kernel, p | {"output_dtype": output_dtype})
    assert y.dtype == output_dtype
    assert ((y.double() - exact).abs() <= 1e-6 * magnitude + torch.finfo(output_dtype).eps * exact.abs()).all()


def test_the_worst_sums_do_not_overflow(kernel) -> None:
    p = problem(3, 5, 1024, 1024)
    for sign in (-127, 127):
        check(kernel, p | {"tokens": torch.full((3, 1024), sign, dtype=torch.int8), "table": [127] * 16})


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("act_fmt", ["e2m3", "e3m4", "e4m3"])
def test_a_linear_is_the_same_through_it(kernel, fmt, act_fmt, dtype, monkeypatch) -> None:
    """The whole path of a GPU's linear; it is taken on the CPU where there is no GPU."""
    torch.manual_seed(0)
    weight = MinifloatTensor.from_hp(torch.randn(70, 256, dtype=dtype), [1, 128], fmt, act_fmt).to(DEVICE)
    x, bias = torch.randn(2, 5, 256, dtype=dtype).to(DEVICE), torch.randn(70, dtype=dtype).to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(int8_linear, "supports", lambda *_: False)
        patch.setattr(compiled_linear, "supports", lambda *_: False)
        on_operators = F.linear(x, weight, bias)
    if DEVICE == "cpu":
        monkeypatch.setattr(fp4dit_ao.kernels.cuda, "triton_linear", kernel, raising=False)
        monkeypatch.setattr(torch.ops.fp4dit_ao, "int8_linear", int8_linear.run)
    fast = F.linear(x, weight, bias)
    assert fast.dtype == dtype
    last_bit = (
        torch.finfo(dtype).eps if dtype.itemsize < 4 else 0
    )  # the interpreter cuts off where a GPU rounds to nearest
    assert torch.allclose(fast.float(), on_operators.float(), rtol=last_bit, atol=1e-5)


def test_levels_need_no_table(kernel) -> None:
    p = problem(9, 70, 256, 128)
    codes = torch.stack([p["qdata"] & 15, p["qdata"] >> 4], -1).flatten(1)
    levels = torch.tensor(WILD, dtype=torch.int8)[codes.long()]
    assert torch.equal(run(kernel, p | {"qdata": levels, "table": None}), run(kernel, p))


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("packed", [True, False])
def test_fp8_levels_are_exact(kernel, fmt, packed) -> None:
    """Products and sums below 2^24 steps: exact in a full float32 accumulator, which the interpreter's is."""
    p = problem(9, 33, 256, 128)
    tokens = FloatFormat.parse("e2m3").round(p["tokens"].float() / 2)
    p |= {"tokens": tokens.to(torch.float8_e4m3fn), "table": level_table(FloatFormat.parse(fmt))}
    exact, magnitude = oracle(p)
    if not packed:
        codes = torch.stack([p["qdata"] & 15, p["qdata"] >> 4], -1).flatten(1)
        levels = torch.tensor(p["table"], dtype=torch.float32)[codes.long()].to(torch.float8_e4m3fn)
        p |= {"qdata": levels, "table": None}
    tolerance = 1e-6 if DEVICE == "cpu" or torch.cuda.get_device_capability() != (9, 0) else 2**-12
    assert ((run(kernel, p) - exact).abs() <= tolerance * magnitude).all()


def test_fp8_takes_only_levels_that_it_holds(kernel) -> None:
    p = problem(2, 4, 64, 32)
    with pytest.raises(ValueError, match=r"expected sixteen levels that torch\.float8_e4m3fn holds exactly"):
        run(kernel, p | {"tokens": p["tokens"].to(torch.float8_e4m3fn)})  # WILD has 127, of seven bits
    for words, dtype in ((range(-8, 8), torch.float8_e4m3fn), (WILD, torch.int8)):
        raw = b"".join(word.to_bytes(4, "little", signed=True) for word in kernel.table_words(tuple(words), dtype))
        assert torch.frombuffer(bytearray(raw), dtype=dtype).float().tolist() == list(words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qdata": torch.zeros(70, 100, dtype=torch.uint8)}, "weight has rows of 100 bytes; expected 128"),
        ({"scale": torch.ones(3, 2)}, "scale has 3 rows; expected 1 or 70"),
        ({"scale": torch.ones(70, 3)}, "scale has 3 groups; expected a number that cuts 256 features into even groups"),
        ({"scale": torch.ones(70)}, "scale has shape .70,.; expected two dimensions"),
        ({"token_scale": torch.ones(2, 1)}, "token_scale has 2 scales; expected 9"),
        ({"bias": torch.ones(69)}, "bias has shape .69,.; expected .70,."),
        ({"table": [0] * 15}, "table has .*; expected sixteen levels that torch.int8 holds exactly"),
        ({"table": [300] * 16}, "table has .*; expected sixteen levels that torch.int8 holds exactly"),
        ({"tokens": torch.zeros(9, 256)}, "tokens has torch.float32; expected torch.int8 or torch.float8_e4m3fn"),
        ({"table": None}, "weight has torch.uint8; expected torch.int8, levels for torch.int8 tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(kernel, change, message) -> None:
    with pytest.raises(ValueError, match=f"^int8_linear: {message}"):
        run(kernel, problem(9, 70, 256, 128) | change)


def test_no_rows(kernel) -> None:
    assert run(kernel, problem(0, 70, 256, 128)).shape == (0, 70)


def test_strides_change_no_bit(kernel) -> None:
    p = problem(12, 70, 256, 128)
    columns = {name: p[name].T.contiguous().T for name in ("tokens", "qdata", "scale")}
    assert torch.equal(run(kernel, p | columns), run(kernel, p))


@pytest.mark.parametrize("group", [2, 6, 16, 32, 48, 64, 96, 112, 128, 160, 384, 1152])
def test_a_tile_stays_in_its_group_and_is_long_enough(kernel, group) -> None:
    size = kernel.block_k(group)
    assert size in (32, 64, 128)
    assert group % size == 0 or size >= min(group, 128)


def test_the_quickest_configuration_is_taken(kernel, monkeypatch) -> None:
    tried = []
    first, second, third = kernel.candidates(4096)[:3]
    seconds = {first: 2.0, second: 1.0}

    def bench(launch, **_):
        launch()
        if tried[-1] is third:
            raise triton.runtime.errors.OutOfResources(1, 0, "shared memory")
        return seconds[tried[-1]]

    monkeypatch.setattr(triton.testing, "do_bench_cudagraph", bench)
    assert kernel.tune([third, first, second], tried.append, "test") == second
    with pytest.raises(RuntimeError, match="too little shared memory"):
        kernel.tune([third], tried.append, "test")


# --- what the interpreter does not run -------------------------------------------------------------------------------


def execute(program: str, operands: dict[str, int]) -> dict[str, int]:
    """The few instructions of the lookup, as the PTX manual (9.7) defines them, on 32-bit registers."""

    def value(name: str) -> int:
        return registers[name] if name in registers else int(name, 0)

    def halves(bits: int) -> torch.Tensor:
        return torch.frombuffer(bytearray(bits.to_bytes(4, "little")), dtype=torch.float16)

    def word(numbers: torch.Tensor) -> int:
        return int.from_bytes(numbers.view(torch.uint8).numpy().tobytes(), "little")

    def prmt(a: int, b: int, selectors: int) -> int:
        source = (b << 32 | a).to_bytes(8, "little")
        result = []
        for position in range(4):
            selector = selectors >> 4 * position & 15
            byte = source[selector & 7]
            result.append((0xFF if byte & 0x80 else 0) if selector & 8 else byte)
        return int.from_bytes(bytes(result), "little")

    semantics = {
        "and": lambda a, b: a & b,
        "or": lambda a, b: a | b,
        "shr": lambda a, b: a >> b,
        "prmt": prmt,
        "mov": lambda a: a,
        "xor": lambda a, b: a ^ b,
        "sub.rn.f16x2": lambda a, b: word(halves(a) - halves(b)),
        "cvt.rn.satfinite.e4m3x2.f16x2": lambda a: word(halves(a).to(torch.float8_e4m3fn)),
        "pack": lambda low, high: low | high << 16,
    }
    registers = dict(operands)
    for line in program.splitlines():
        line = re.sub(r"^mov\.b32 (\S+), \{(.+)\};$", r"pack \1, \2;", line)  # two halves of a word
        found = re.fullmatch(r"(and|or|shr|prmt|mov|xor|pack|sub\.rn\.f16x2|cvt\S+)(?:\.[bu]32)? ([$\w]+), (.+);", line)
        if found is None:
            assert line in ("", "{", "}") or line.startswith((".reg .b32", ".reg .b16")), line
            continue
        registers[found[2]] = semantics[found[1]](*(value(name.strip()) for name in found[3].split(",")))
    return registers


def test_the_lookup_instructions_look_up() -> None:
    """The first two bytes of a register in one table, the others in a second one, whatever the other operands hold."""
    rng = random.Random(0)
    tables = [[rng.randrange(256) for _ in range(16)] for _ in range(4)]
    inputs = {
        f"${3 + 4 * word + lane}": int.from_bytes(bytes(tables[lane][4 * word : 4 * word + 4]), "little")
        for word in range(4) for lane in range(4)
    }  # fmt: skip
    of_byte = [tables[0], tables[0], tables[2], tables[2]]
    every_byte_in_every_place = [[byte if lane == place else rng.randrange(256) for lane in range(4)]
                                 for place, byte in itertools.product(range(4), range(256))]  # fmt: skip
    for packed in every_byte_in_every_place:
        out = execute(
            interpreter.loaded("triton_lookup").PROGRAM, inputs | {"$2": int.from_bytes(bytes(packed), "little")}
        )
        assert list(out["$0"].to_bytes(4, "little")) == [
            table[byte & 15] for table, byte in zip(of_byte, packed, strict=True)
        ]
        assert list(out["$1"].to_bytes(4, "little")) == [
            table[byte >> 4] for table, byte in zip(of_byte, packed, strict=True)
        ]


def test_the_lookup_of_words_keeps_the_order() -> None:
    rng = random.Random(0)
    program = interpreter.loaded("triton_lookup").WORD_PROGRAM
    table = [rng.randrange(256) for _ in range(16)]
    inputs = {f"${3 + i}": int.from_bytes(bytes(table[4 * i : 4 * i + 4]), "little") for i in range(4)}
    for _ in range(500):
        codes = [rng.randrange(16) for _ in range(8)]
        word = sum(code << 4 * place for place, code in enumerate(codes))
        out = execute(program, inputs | {"$2": word})
        assert [*out["$0"].to_bytes(4, "little"), *out["$1"].to_bytes(4, "little")] == [table[code] for code in codes]


def test_the_conversion_of_tables_gives_e4m3s_levels() -> None:
    """All levels that E4M3 holds, in every byte of a word."""
    program = interpreter.loaded("triton_lookup").FP8_PROGRAM
    levels = torch.arange(-127, 128)
    levels = levels[levels.float().to(torch.float8_e4m3fn).float() == levels]
    assert len(levels) == 79
    for place, level in itertools.product(range(4), levels.tolist()):
        given = [0, 0, 0, 0]
        given[place] = level
        out = execute(
            program, {"$1": int.from_bytes(torch.tensor(given, dtype=torch.int8).numpy().tobytes(), "little")}
        )
        found = torch.frombuffer(bytearray(out["$0"].to_bytes(4, "little")), dtype=torch.float8_e4m3fn).float()
        assert found.tolist() == given


@pytest.fixture(scope="module")
def compiled() -> list[dict]:
    lines: list[str] = []
    command = [sys.executable, "-m", "benchmarks.gpu_compile", "--json", "--no-every"]
    lines += subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def test_it_compiles_for_every_gpu_and_hardly_spills(compiled) -> None:
    assert {result["capability"] for result in compiled} == {80, 89, 90, 100}
    assert len(compiled) > 50
    for result in compiled:
        if "attention" in result:
            assert result["capability"] < 90 or not result["spilled"], result
            continue
        assert result["spilled"] <= 16, result  # bytes: Triton 3.9 spills three registers, once
        assert result["registers"] < 255, result
        assert result["shared"] <= 160 * 1024, result  # what an A100 gives a block, less than later ones


def test_it_multiplies_on_tensor_cores(compiled) -> None:
    for result in compiled:
        if "decoding" in result:
            assert result["lookups"] >= 24 and result["stores of 16 bytes"] == 2 and not result["spilled"], result
            continue
        if "few tokens" in result:
            assert result["pairs of one row"], result
        if "attention" in result:
            found = " ".join(result["instructions"])
            assert re.search(r"e4m3\.e4m3|kind::f8f6f4", found) and re.search(r"bf16\.bf16|kind::f16", found), result
            continue
        (instruction,) = result["instructions"]
        # less than 64 features: Triton has no product of bytes on Hopper, and takes float16, which holds E4M3's levels
        expected = r"s8\.s8|kind::i8" if result["tokens"] == "i8" else r"e4m3\.e4m3|kind::f8f6f4|m16n8k16\S*f16\.f16"
        assert re.search(expected, instruction), result
        if result["capability"] == 90 and "block_n=32" not in result["config"]:
            assert instruction.startswith("wgmma")


def test_importing_the_package_loads_no_kernel() -> None:
    script = "import sys, fp4dit_ao.tensors.minifloat; sys.exit('fp4dit_ao.kernels.cuda.triton_linear' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_choosing_it_breaks_no_graph(monkeypatch) -> None:
    """The questions asked of a GPU are asked while torch.compile traces; here they are answered for it."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked_of = []

    def supports(device: torch.device, bits: int, group_size: int) -> bool:
        asked_of.append(device)
        return int8_linear.capability.__wrapped__(torch.device("cuda", 0)) >= int8_linear.CAPABILITY

    weight = MinifloatTensor.from_hp(torch.randn(48, 128), [1, 64], "e2m1", "e2m3")
    x = torch.randn(5, 128)
    with monkeypatch.context() as patch:
        patch.setattr(int8_linear, "supports", supports)
        patch.setattr(compiled_linear, "supports", lambda *_: False)
        got = torch.compile(lambda x: F.linear(F.silu(x), weight), fullgraph=True)(x)
    assert asked_of
    assert torch.allclose(got, F.linear(F.silu(x), weight), rtol=1e-4, atol=1e-4)


def test_a_cpu_tensor_never_takes_it() -> None:
    assert not int8_linear.supports(torch.device("cpu"), 4, 128)
