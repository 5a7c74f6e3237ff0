"""A byte a level: the same values as packed codes, or refused."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fp4dit_ao import CodebookTensor, FloatFormat, MinifloatTensor, lower, unpack_weights, w4a6, w4a6_codebook, w4a8
from fp4dit_ao.config import int_w4a8
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.tensors.levels import LevelTensor, fits
from tests.passes.test_lowering import converted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("fmt", ["e2m1", "e3m0", "e1m2"])
@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("block", [[1, 128], [1, 16], [1, -1], [-1, -1], [1, 96]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_linear_computes_the_same(fmt, to, block, dtype) -> None:
    torch.manual_seed(0)
    depth = 192 if block[1] == 96 else 256
    packed = MinifloatTensor.from_hp(torch.randn(70, depth, dtype=dtype), block, fmt, "e2m3", torch.float16).to(DEVICE)
    x, bias = torch.randn(2, 9, depth, dtype=dtype).to(DEVICE), torch.randn(70, dtype=dtype).to(DEVICE)
    unpacked = LevelTensor.from_packed(packed, to)
    assert torch.equal(unpacked.dequantize(), packed.dequantize())
    assert unpacked.qdata.nbytes == 2 * packed.qdata.nbytes
    for b in (bias, None):
        expected, got = F.linear(x, packed, b), F.linear(x, unpacked, b)
        assert got.dtype == dtype
        tolerance = torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
        if to == "fp8" and DEVICE == "cuda":
            tolerance = 2**-8
        assert torch.allclose(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("fmt", "exact"),
    [
        ("e2m1", True),
        ("e3m0", True),
        ("e1m2", True),
        ("e2m3", True),
        ("e3m2", True),
        ("e4m3fn", False),
        ("int6", False),
    ],
)
def test_which_formats_fp8_holds(fmt, exact) -> None:
    """Four significant bits and 2^8 of range above the step; E4M3 itself has more binades than its own normal range."""
    lattice = FloatFormat.parse(fmt).lattice
    assert fits(lattice.float(), torch.float8_e4m3fn) == exact
    wide = [abs(level) for level in lattice.tolist() if level]
    derived = all((level // (level & -level)).bit_length() <= 4 and level <= 448 for level in wide)
    assert derived == exact


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codebook_groups_are_one_product(to, dtype) -> None:
    """With a scale for each row; int8's bits are those of packed weights, for nothing is summed in float."""
    config = w4a6_codebook()
    packed = scheme_of(config).round_to_nearest("linear", torch.randn(48, 256).to(dtype), config).to(DEVICE)
    unpacked = LevelTensor.from_packed(packed, to)
    assert unpacked.scale.shape == (48, 1)
    assert torch.equal(unpacked.dequantize(), packed.dequantize())
    x = torch.randn(5, 256, dtype=dtype, device=DEVICE)
    expected, got = F.linear(x, packed), F.linear(x, unpacked)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    assert torch.allclose(got.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("to", ["int8", "fp8"])
@pytest.mark.parametrize("config", [w4a6(), w4a6_codebook()], ids=["groups", "codebook"])
@torch.no_grad()
def test_a_whole_model(to, config) -> None:
    graph, sample = converted(config)
    lowered = lower(graph)
    expected = lowered(**sample)[0]
    assert unpack_weights(lowered, to) is lowered
    weights = [p.detach() for p in lowered.parameters()]
    assert sum(isinstance(w, LevelTensor) for w in weights) == 12
    assert not any(isinstance(w, MinifloatTensor | CodebookTensor) for w in weights)
    assert (lowered(**sample)[0] - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("to", ["int8", "fp8"])
@torch.no_grad()
def test_compiled(to) -> None:
    packed = MinifloatTensor.from_hp(torch.randn(48, 128), [1, 32], "e2m1", "e2m3").to(DEVICE)
    module = torch.nn.Linear(128, 48).to(DEVICE)
    module.weight = torch.nn.Parameter(LevelTensor.from_packed(packed, to), requires_grad=False)
    compiled = torch.compile(lambda x: module(F.silu(x)), fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x = torch.randn(2, rows, 128).to(DEVICE)
        assert torch.allclose(compiled(x), module(F.silu(x)), rtol=1e-4, atol=1e-3)


def test_what_a_byte_does_not_hold_is_refused_and_named() -> None:
    graph, _ = converted(int_w4a8())
    lowered = lower(graph)
    with pytest.raises(ValueError, match=r"blocks\.0\..*weight: fp8 does not hold every level of"):
        unpack_weights(lowered, "fp8")
    assert any(isinstance(p.detach(), MinifloatTensor) for p in lowered.parameters())
    unpack_weights(lowered, "int8")
    with pytest.raises(ValueError, match="no packed weight to unpack"):
        unpack_weights(lowered, "int8")
    with pytest.raises(ValueError, match="int8 does not hold every level of e3m4"):
        unpack_weights(lower(converted(w4a8())[0]), "int8")
    with pytest.raises(ValueError, match="int8, fp8 or bfloat16, not to 'int4'"):
        unpack_weights(lower(graph), "int4")


def test_moving_and_casting_keeps_levels() -> None:
    packed = MinifloatTensor.from_hp(torch.randn(8, 64), [1, 32], "e2m1", "e2m3")
    unpacked = LevelTensor.from_packed(packed, "int8").to(torch.bfloat16)
    assert (type(unpacked), unpacked.dtype) == (LevelTensor, torch.bfloat16)
    assert torch.equal(unpacked.dequantize(torch.float32), packed.dequantize())


def test_unpacked_weights_are_neither_saved_nor_recaptured(tmp_path) -> None:
    from fp4dit_ao import quantize_pipeline
    from tests.tiny import CALL, tiny_pipeline

    pipe = quantize_pipeline(
        tiny_pipeline(layers=1), prompts=["a cat"], rounding="nearest", progress=False, **CALL
    )  # fmt: skip
    before = pipe.transformer.nbytes()
    unpack_weights(pipe.transformer)
    assert pipe.transformer.nbytes() > before
    pipe("a cat", **CALL)
    with pytest.raises(ValueError, match="saving needs packed weights"):
        pipe.save_pretrained(tmp_path / "no")
    with pytest.raises(ValueError, match=r"changing the type to torch.bfloat16 .* before unpack_weights"):
        pipe.transformer.to(torch.bfloat16)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_memory_or_speed_is_chosen_when_a_pipeline_is_loaded(tiny_quantized, tmp_path, form) -> None:
    from fp4dit_ao import example_inputs, load_pipeline
    from fp4dit_ao.checkpoint.empty_model import empty_model
    from fp4dit_ao.checkpoint.graph_tensors import flatten

    tiny_quantized.save_pretrained(tmp_path / "pipe")
    model = load_pipeline(tmp_path / "pipe", form=form).transformer
    sample = example_inputs(empty_model(dict(tiny_quantized.transformer.config)))
    with torch.no_grad():
        expected = model(**sample).sample
    packed = {name.removeprefix("graph."): p.detach() for name, p in model.named_parameters()}
    for weights, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        fast = load_pipeline(tmp_path / "pipe", form=form, weights=weights).transformer
        found = {name.removeprefix("graph."): p.detach() for name, p in fast.named_parameters()}
        bytes_each = {name: p for name, p in found.items() if isinstance(p, LevelTensor)}
        assert bytes_each.keys() == {name for name, p in packed.items() if isinstance(p, MinifloatTensor)}
        for name, p in bytes_each.items():
            assert p.qdata.dtype == dtype
            assert torch.equal(p.dequantize(), packed[name].dequantize())
            assert flatten("", p)[".qdata"].nbytes == 2 * packed[name].qdata.nbytes
        with torch.no_grad():
            assert (fast(**sample).sample - expected).norm() < 0.02 * expected.norm()
    with pytest.raises(ValueError, match="weights='int4'; choose one of packed, int8, fp8, auto"):
        load_pipeline(tmp_path / "pipe", form=form, weights="int4")


def test_the_operator_matches_its_fake() -> None:
    unpacked = LevelTensor.from_packed(MinifloatTensor.from_hp(torch.randn(8, 64), [1, 32], "e2m1", "e2m3"), "int8")
    tokens = torch.randint(-60, 61, (5, 64), dtype=torch.int8)
    args = (tokens, torch.ones(5, 1), unpacked.qdata, unpacked.scale, torch.ones(8), torch.bfloat16)
    torch.library.opcheck(torch.ops.fp4dit_ao.level_linear.default, args)


def test_importing_the_package_is_still_quick() -> None:
    subprocess.run([sys.executable, "-c", "import sys, fp4dit_ao; sys.exit('torch' in sys.modules)"], check=True)
