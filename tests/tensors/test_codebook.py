"""CodebookTensor: exact products, the same bits in every form, and the way through lowering, rounding and files."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import (
    CodebookTensor,
    FP4DiTQuantizer,
    QuantConfig,
    calibrate,
    capture,
    lower,
    quantize_modules,
    reconstruct,
)
from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.families import example_inputs
from fp4dit_ao.formats import codebook_set, parse
from fp4dit_ao.passes.subclass_unwrapping import unwrap
from fp4dit_ao.schemes import scheme_of
from tests.graphs import TinyDiT, tiny_sample
from tests.tiny import tiny_pipeline

RECIPES = ["w4a6_codebook", "w4a8_codebook", "w4a4_codebook"]
LINEAR = torch.ops.aten.linear.default


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(
    groups: int = 3, act_fmt: str | None = "e2m3", dtype: torch.dtype = torch.float32, rows: int = 20
) -> CodebookTensor:
    generator = torch.Generator().manual_seed(groups)
    codes = torch.randint(0, 16, (rows, groups * 32), generator=generator, dtype=torch.uint8)
    index = torch.randint(0, 16, (rows, groups), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, generator=generator) / 50 + 1e-3
    books = codebook_set("nf4_groups").tensor()
    return CodebookTensor.from_codes(codes, index, scale, books, "nf4_groups", act_fmt, dtype)


@pytest.mark.parametrize("groups", [1, 2, 3, 8])
def test_parts_and_values(groups: int) -> None:
    w = made(groups)
    assert w.shape == (20, groups * 32)
    assert w.qdata.shape == (20, groups * 16)
    assert w.index.shape == (20, (groups + 1) // 2)
    assert w.books.shape == (20, groups)
    value = w.dequantize()
    for row, column in [(0, 0), (7, groups * 32 - 1), (19, 5)]:
        nibble = w.index[row, column // 64] >> 4 * (column // 32 % 2) & 15
        code = w.qdata[row, column // 2] >> 4 * (column % 2) & 15
        assert value[row, column] == w.codebooks[nibble.item(), code.item()].float() * w.row_scale[row]


@pytest.mark.parametrize("act_fmt", ["e2m3", "int8", "e3m4", "e4m3fn", "e5m2", None])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_against_float64(act_fmt: str | None, bias: bool) -> None:
    w, x = made(4, act_fmt), normal(2, 7, 128)
    b = normal(20, seed=2) if bias else None
    values = x.double()
    if act_fmt is not None:
        fmt = parse(act_fmt)
        scale = x.abs().amax(-1, keepdim=True) / torch.tensor(float(fmt.lattice_max))
        values = fmt.round(x / scale).double() * scale.double()
    exact = F.linear(values, w.dequantize(torch.float32).double(), None if b is None else b.double())
    y = F.linear(x, w, b)
    assert y.shape == (2, 7, 20)
    assert (y.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_round_once(dtype: torch.dtype) -> None:
    w, x = made(4, "int8", dtype), normal(5, 128).to(dtype)
    wide = F.linear(x.float(), w.to(torch.float32))
    y = F.linear(x, w)
    assert y.dtype == dtype
    assert (y.float() - wide).abs().max() <= 1.01 * torch.finfo(dtype).eps * wide.abs().max()


def test_moving_casting_and_copying_keep_codes() -> None:
    w = made()
    half = w.to(torch.bfloat16)
    assert (type(half), half.dtype) == (CodebookTensor, torch.bfloat16)
    for other in (half, w.to("cpu"), copy.deepcopy(w), w.detach(), w.clone()):
        assert torch.equal(other.dequantize(torch.float32), w.dequantize(torch.float32))
    assert "nf4_groups" in repr(w)
    assert "tensor(" not in repr(w)
    file = io.BytesIO()
    torch.save({"w": w}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["w"].dequantize(), w.dequantize())


def test_compiles_whole() -> None:
    w, bias = made(4), normal(20)
    compiled = torch.compile(lambda x: F.linear(F.silu(x), w, bias), fullgraph=True, dynamic=True)
    for rows in (3, 8):
        x = normal(2, rows, 128)
        expected = F.linear(F.silu(x), w, bias)
        assert (compiled(x) - expected).norm() <= 2e-2 * expected.norm()


def converted(recipe: str) -> tuple[Any, dict[str, Tensor]]:
    sample = tiny_sample(batch=3, tokens=17)
    prepared = prepare_pt2e(
        capture(TinyDiT(layers=1), sample), FP4DiTQuantizer().set_global(QuantConfig.from_name(recipe))
    )
    with torch.no_grad():
        prepared(**sample)
    return convert_pt2e(prepared), sample


class EveryLinear(torch.fx.Interpreter):
    """Runs a graph and keeps each linear's inputs and output."""

    def __init__(self, graph: torch.fx.GraphModule):
        super().__init__(graph)
        self.seen: list[tuple[Any, Tensor]] = []

    def run_node(self, node: torch.fx.Node) -> Any:
        result = super().run_node(node)
        if node.target is LINEAR:
            self.seen.append((self.fetch_args_kwargs_from_env(node)[0], result))
        return result


@pytest.mark.parametrize("recipe", RECIPES)
@torch.no_grad()
def test_lowered_unwrapped_and_exported(recipe: str) -> None:
    graph, sample = converted(recipe)
    lowered = lower(graph)
    reference = EveryLinear(graph)
    reference.run(*sample.values(), False)
    nodes = [node for node in lowered.graph.nodes if node.target is LINEAR]
    low_bit = 0
    for node, (arguments, expected) in zip(nodes, reference.seen, strict=True):
        weight = lowered.get_parameter(str(node.args[1].target))
        if isinstance(weight, CodebookTensor):
            low_bit += 1
            assert torch.equal(weight.dequantize(), arguments[1])
            assert weight.act_fmt == str(parse(QuantConfig.from_name(recipe).activation))
            assert weight.fmt == "nf4_groups"
        # what is quantized already is a fixed point, up to the last bit of its scale
        got = F.linear(arguments[0], weight, arguments[2])
        assert (got - expected).abs().max() <= 8e-6 * expected.abs().max()
    assert low_bit == 6
    assert set(lowered.state_dict()) == set(TinyDiT(layers=1).state_dict())

    plain = unwrap(lowered)
    assert not any(isinstance(x.detach(), TorchAOBaseTensor) for x in (*plain.parameters(), *plain.buffers()))
    expected = lowered(**sample)[0]
    assert torch.equal(plain(**sample)[0], expected)
    file = io.BytesIO()
    torch.export.save(torch.export.export(plain, (), sample | {"return_dict": False}, strict=False), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(**sample, return_dict=False)[0], expected)


@pytest.mark.parametrize("rounding", ["scale_aware", "gptq"])
def test_learned_and_closed_form_rounding(rounding: str) -> None:
    samples = [tiny_sample(seed=seed) for seed in range(4)]
    prepared = prepare_pt2e(
        capture(TinyDiT(layers=1), samples[0]), FP4DiTQuantizer().set_global(QuantConfig.from_name(RECIPES[0]))
    )
    calibrate(prepared, samples)
    config = ReconstructionConfig(rounding=rounding, iters=40, batch_size=8, relative_lr=0.2)
    report = reconstruct(prepared, samples, config, progress=False)
    assert any(row.changed > 0 for row in report.rows)
    assert all(row.loss_after <= row.loss_before for row in report.rows)
    graph = convert_pt2e(prepared)
    lowered = lower(graph)
    with torch.no_grad():
        expected, got = graph(**samples[0])[0], lowered(**samples[0])[0]
    assert (got - expected).norm() <= 1e-2 * expected.norm()
    name = "blocks.0.ff.up.weight"
    assert torch.equal(lowered.get_parameter(name).codes, graph.get_buffer(f"{name}_codes"))


@torch.no_grad()
def test_a_model_comes_back_in_both_forms(tmp_path: Path) -> None:
    model: Any = quantize_modules(tiny_pipeline(layers=1).transformer, "w4a6_codebook")
    model.save_pretrained(tmp_path / "t")
    graph, modules = load_graph(tmp_path / "t"), load_modules(tmp_path / "t")
    low = {name: p for name, p in model.named_parameters() if isinstance(p, CodebookTensor)}
    assert len(low) == 10
    for name, weight in low.items():
        for other in (graph.graph.get_parameter(name), modules.get_parameter(name)):
            for part in CodebookTensor.tensor_data_names:
                assert torch.equal(getattr(other, part), getattr(weight, part))
            assert (other.group_size, other.fmt, other.act_fmt) == (weight.group_size, weight.fmt, weight.act_fmt)
    sample = example_inputs(model)
    expected = model(**sample).sample
    assert torch.equal(modules(**sample).sample, expected)
    assert torch.equal(graph(**sample).sample, expected)


def test_configs_that_contradict_themselves_are_refused() -> None:
    given: dict[str, Any] = {"weight": "nf4_groups", "weight_search": "mse", "pre_gelu_weight": None}
    assert QuantConfig(**given).scheme == "codebook_groups"
    assert scheme_of(QuantConfig(**given)).block_size(QuantConfig(**given)) == [1, 128]
    for change, message in (
        ({"weight_search": "absmax"}, "weight_search='mse'"),
        ({"weight_granularity": "channel"}, "weight_granularity='group'"),
        ({"scale_dtype": "float16"}, "scale_dtype='float32'"),
        ({"weight_candidates": ("nf4_groups", "nf4")}, "do not mix with number formats"),
        ({"weight": "nf4", "weight_candidates": ("nf4_groups",)}, "do not mix with number formats"),
        ({"group_size": 6}, "a multiple of 4"),
        ({"activation": "nf4_groups"}, "activation: unknown number format 'nf4_groups'"),
    ):
        with pytest.raises(ValueError, match=message):
            QuantConfig(**given | change)
