"""What is picked is what runs, on every device that there is; and what would be picked on those that there are not."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fp4dit_ao import MinifloatTensor, QuantConfig, _compat, kernels
from fp4dit_ao.config import RECIPES
from fp4dit_ao.formats import parse
from fp4dit_ao.kernels.attention import ATTENTION, AttentionOperands
from fp4dit_ao.kernels.block_scaled_linear import BLOCK_SCALED_LINEAR, BlockOperands
from fp4dit_ao.kernels.candidate_search import CANDIDATE_SEARCH, SearchOperands
from fp4dit_ao.kernels.codebook_dispatch import CODEBOOK_LINEAR
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.kernels.cuda import int8_linear as cuda_linear
from fp4dit_ao.kernels.level_linear import LEVEL_LINEAR, LevelOperands
from fp4dit_ao.kernels.token_quantization import TOKENS, TokenOperands
from fp4dit_ao.kernels.units import Unit, UnitTable
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.tensors.levels import LevelTensor
from tests.tensors.test_block_scaled import weight_of

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TRACES = {
    "int8, compiled kernel": {"fp4dit_ao.int8_linear"},
    "int8, PyTorch operators": {"aten._int_mm"},
    "float32, dequantized": {"aten.mm", "aten.addmm"},
    "float32, FP8 levels widened": {"aten.mm", "aten.addmm"},
    "block-scaled, emulated in float32": {"aten.mm", "aten.addmm"},
    "int8 scores, compiled kernel": {"fp4dit_ao.int8_attention"},
    "PyTorch's attention, rounded values": {"aten._scaled_dot_product_flash_attention_for_cpu"},
}
"""An operator that a unit calls, and no other unit of its table does."""


CODEBOOK_RECIPES = ("w4a4_codebook", "w4a6_codebook", "w4a8_codebook")


class Called(TorchDispatchMode):
    """The names of the operators that reach a device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).rpartition(".")[0])
        return func(*args, **(kwargs or {}))


def units_that_ran(names: set[str], table: UnitTable) -> set[str]:
    """The units of ``table`` whose traces are among the operators; a float product is a trace only where nothing else is."""
    found = {unit.name for unit in table.units if TRACES.get(unit.name, set()) & names}
    special = {name for name in found if not name.startswith(("float32", "block-scaled"))}
    return special or found


@pytest.fixture(autouse=True)
def instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU with int8 instructions: without them, exact products in float32 leave another trace."""
    monkeypatch.setattr(_compat, "cpu_multiplies_int8", lambda: True)


@pytest.fixture(params=["library", "no library"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "no library":
        monkeypatch.setattr(native, "shared_object", lambda: None)
    elif native.shared_object() is None:
        pytest.skip("the package was installed without its compiled kernel")
    return request.param


def quantized_weights(recipe: str) -> Iterator[Any]:
    """Each kind of weight that the recipe makes."""
    config = QuantConfig.from_name(recipe)
    if config.activation_granularity == "block":
        yield weight_of(recipe)
        return
    act_fmt = config.activation if config.activation_granularity == "token" else None
    for fmt in dict.fromkeys((config.weight, config.pre_gelu_weight, *config.weight_candidates)):
        if fmt is not None:
            yield MinifloatTensor.from_hp(torch.randn(48, 256), [1, config.group_size], fmt, act_fmt)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(CODEBOOK_RECIPES)))
@torch.no_grad()
def test_the_picked_unit_runs(recipe: str, library: str) -> None:
    for weight in quantized_weights(recipe):
        unit = weight.unit()
        table = kernels.LINEAR if isinstance(weight, MinifloatTensor) else BLOCK_SCALED_LINEAR
        with Called() as called:
            F.linear(torch.randn(5, weight.shape[1]), weight)
        assert units_that_ran(called.names, table) == {unit.name}, called.names
        assert ("compiled kernel" in unit.name) <= (library == "library")


@pytest.mark.parametrize("recipe", CODEBOOK_RECIPES)
@torch.no_grad()
def test_the_picked_unit_of_codebook_groups_runs(recipe: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantConfig.from_name(recipe)
    weight: Any = scheme_of(config).round_to_nearest("fc", torch.randn(48, 256), config)
    unit = weight.unit()
    assert ("compiled kernel" in unit.name) == (library == "library")
    with Called() as called:
        F.linear(torch.randn(5, 256), weight)
    assert "fp4dit_ao.codebook_linear" in called.names
    ran = spied(CODEBOOK_LINEAR, monkeypatch)
    F.linear(torch.randn(5, 256), weight)
    assert ran == [unit.name]


@pytest.mark.parametrize("to", ["int8", "fp8"])
def test_the_picked_unit_of_levels_runs(to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = MinifloatTensor.from_hp(torch.randn(48, 128), [1, 32], "e2m1", "e2m3")
    weight = LevelTensor.from_packed(packed, to)
    unit = weight.unit()
    with Called() as called:  # an operator of its own hides what it calls: its function is traced instead
        arguments = torch.ones(5, 128, dtype=weight.qdata.dtype), torch.ones(5, 1), weight.qdata, weight.scale, None
        kernels.level_linear.level_linear(*arguments, torch.float32)
    assert units_that_ran(called.names, LEVEL_LINEAR) == {unit.name}
    ran = spied(LEVEL_LINEAR, monkeypatch, torch.zeros(5, 48))
    F.linear(torch.randn(5, 128), weight)
    assert ran == [unit.name]


@pytest.mark.parametrize("fmt", ["e2m3", "e3m4", "e4m3fn", "nf4"])
def test_the_picked_unit_of_attention_runs(fmt: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if library == "no library":
        monkeypatch.setattr("fp4dit_ao.kernels.attention.kernels", dict)
    q, k, v = (torch.randn(2, 3, 9, 64) for _ in range(3))
    with Called() as called:
        torch.ops.fp4dit_ao.attention(q, k, v, None, None, fmt)
    assert units_that_ran(called.names, ATTENTION) == {ATTENTION.pick(AttentionOperands(parse(fmt), CPU, 64)).name}


def spied(table: UnitTable, monkeypatch: pytest.MonkeyPatch, result: Tensor | None = None) -> list[str]:
    """Replaces the units' functions by ones that record the unit's name and return ``result``."""
    ran: list[str] = []

    def record(name: str) -> Any:
        return lambda *args: ran.append(name) or (torch.zeros(1) if result is None else result)

    monkeypatch.setattr(table, "units", [Unit(u.name, u.supports, record(u.name), u.detail) for u in table.units])
    return ran


@pytest.fixture(params=[(7, 5), (8, 0), (8, 9), (9, 0), (10, 0)], ids=str)
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """A machine that answers as if it had such a GPU, with Triton installed."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: request.param)
    monkeypatch.setattr(cuda_linear, "_triton_installed", lambda: True)
    cuda_linear.capability.cache_clear()
    yield request.param
    cuda_linear.capability.cache_clear()


@pytest.mark.parametrize(
    ("fmt", "act_fmt", "group", "turing", "ampere"),
    [
        ("e2m1", "e2m3", 128, "int8, PyTorch operators", "int8, Triton"),
        ("nf4", "e3m4", 2, "int8, PyTorch operators", "int8, Triton"),
        ("e2m1", "e2m3", 3, "int8, PyTorch operators", "int8, PyTorch operators"),
        ("e2m3", "e2m3", 128, "int8, PyTorch operators", "int8, PyTorch operators"),
        ("e2m1", None, 128, "float32, dequantized", "float32, dequantized"),
        ("e3m2", "e2m3", 128, "float32, dequantized", "float32, dequantized"),
    ],
)
def test_linears_on_gpus(fmt, act_fmt, group, turing, ampere, capability, monkeypatch) -> None:
    expected = turing if capability < (8, 0) else ampere
    act = act_fmt and parse(act_fmt)
    assert kernels.pick(parse(fmt), act, GPU, group).name == expected
    ran = spied(kernels.LINEAR, monkeypatch)
    x = type("OnGpu", (), {"device": GPU, "shape": (5, 4 * group), "ndim": 2})()
    kernels.linear(x, None, None, [1, group], fmt, act_fmt, None)  # type: ignore[arg-type]
    assert ran == [expected]


def test_levels_and_blocks_on_gpus(capability: tuple[int, int]) -> None:
    ampere, ada, blackwell = (capability >= first for first in ((8, 0), (8, 9), (10, 0)))
    int8, fp8 = torch.int8, torch.float8_e4m3fn
    for operands, expected in (
        (LevelOperands(int8, GPU, (64, 256), 2), "int8, Triton" if ampere else "int8, PyTorch operators"),
        (LevelOperands(fp8, GPU, (64, 256), 2), "FP8, Triton" if ada else "float32, FP8 levels widened"),
        (
            LevelOperands(fp8, GPU, (64, 256), 1),
            "FP8, row-wise scaled product" if ada else "float32, FP8 levels widened",
        ),
        (LevelOperands(fp8, GPU, (70, 256), 1), "float32, FP8 levels widened"),
        (LevelOperands(int8, GPU, (64, 256), 1), "int8, PyTorch operators"),
    ):
        assert LEVEL_LINEAR.pick(operands).name == expected, operands
    for fmt, dtype, emulated in (
        ("e2m1", torch.bfloat16, "bfloat16"), ("e2m1", torch.float32, "float32"), ("e2m3", torch.bfloat16, "bfloat16"),
    ):  # fmt: skip
        native_unit = blackwell and fmt == "e2m1"
        expected = "block-scaled, Blackwell" if native_unit else f"block-scaled, emulated in {emulated}"
        assert BLOCK_SCALED_LINEAR.pick(BlockOperands(fmt, GPU, dtype)).name == expected
    assert (
        BLOCK_SCALED_LINEAR.pick(BlockOperands("e2m1", CPU, torch.bfloat16)).name == "block-scaled, emulated in float32"
    )


def test_loops_and_attention_are_for_cpus(library: str) -> None:
    loop = "compiled loop" if library == "library" else "PyTorch operators"
    fmt = parse("e2m3")
    assert TOKENS.pick(TokenOperands(fmt, CPU, torch.bfloat16, True)).name == loop
    assert TOKENS.pick(TokenOperands(fmt, CPU, torch.float64, True)).name == "PyTorch operators"
    assert TOKENS.pick(TokenOperands(fmt, GPU, torch.bfloat16, True)).name == "PyTorch operators"
    assert CANDIDATE_SEARCH.pick(SearchOperands(parse("e2m1"), CPU, True)).name == loop
    assert CANDIDATE_SEARCH.pick(SearchOperands(parse("e2m1"), GPU, True)).name == "PyTorch operators"
    assert ATTENTION.pick(AttentionOperands(fmt, GPU, 64)).name == "PyTorch's attention, rounded values"


def test_a_unit_is_shown_with_what_differs_from_machine_to_machine() -> None:
    unit = kernels.pick(parse("e2m1"), parse("e2m3"), "cpu")
    if native.shared_object() is not None:
        assert str(unit) == f"int8, compiled kernel ({next(iter(native.kernels()))})"
    assert str(kernels.pick(parse("e2m1"), None, "cpu")) == "float32, dequantized"


def test_registered_units_come_in_front() -> None:
    table: UnitTable[int] = UnitTable("adding", [Unit("slow", lambda n: n < 9, lambda: 1)])
    table.register(Unit("fast", lambda n: n == 3, lambda: 2), before="slow")
    assert [table.pick(n).name for n in (2, 3)] == ["slow", "fast"]
    with pytest.raises(ValueError, match=r"adding: none of its units \(fast, slow\) supports 9"):
        table.pick(9)
    with pytest.raises(ValueError, match="there already is a unit 'fast'"):
        table.register(Unit("fast", lambda n: True, lambda: 3), before="slow")
    with pytest.raises(ValueError, match="no unit 'other' to register before"):
        table.register(Unit("new", lambda n: True, lambda: 3), before="other")


def test_every_table_accepts_anything_in_the_end() -> None:
    assert set(kernels.TABLES) == {
        "linear", "linear with codebook groups", "level_linear", "block_scaled_linear", "attention", "quantize_tokens",
        "candidate_search",
    }  # fmt: skip
    for table in kernels.TABLES.values():
        assert table.units[-1].supports(None), table.operation  # type: ignore[arg-type]
        assert len({unit.name for unit in table.units}) == len(table.units)


def test_a_moved_module_runs_on_the_unit_of_its_new_device(capability, monkeypatch) -> None:
    """``unit`` asks for a device that the weight is not on."""
    layer = nn.Linear(256, 48)
    layer.weight = nn.Parameter(
        MinifloatTensor.from_hp(layer.weight.detach(), [1, 128], "e2m1", "e2m3"), requires_grad=False
    )
    weight: Any = layer.weight.data
    assert weight.unit("cuda:0").name == ("int8, Triton" if capability >= (8, 0) else "int8, PyTorch operators")
    assert weight.unit("cpu") == weight.unit()
    assert isinstance(weight.dequantize(), Tensor)
