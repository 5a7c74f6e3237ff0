"""Transformers of a user's own, who exports them: linears on parameters and of every rank, products that are no linears."""

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import export
from torch.fx import GraphModule
from torchao.quantization.granularity import PerGroup
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import (
    FP4DiTQuantizer,
    QuantConfig,
    ReconstructionConfig,
    calibrate,
    capture,
    lower,
    quantize_modules,
    reconstruct,
    transform,
    w4a6,
)
from fp4dit_ao.observers import Grid, WeightObserver
from fp4dit_ao.passes.block_outlining import kinds_of_blocks, outline
from fp4dit_ao.passes.compilation import compile_blocks
from fp4dit_ao.passes.joined_linears import join_linears
from fp4dit_ao.passes.reconstruction.rounding import ROUNDINGS, ClosedFormRounding
from fp4dit_ao.passes.transforms.registry import TRANSFORMS
from tests.graphs import TinyDiT, tiny_sample

RECIPE = replace(w4a6(), group_size=32, skip=(), indivisible="divisor")
STATIC = replace(RECIPE, activation_granularity="tensor")


class Functional(nn.Module):
    """Linears on parameters: several of one module, of different widths, in a list, at the root, and one that is computed."""

    def __init__(self, width: int = 64):
        super().__init__()
        torch.manual_seed(0)
        self.gain = nn.Parameter(torch.ones(width))
        self.root = nn.Parameter(torch.randn(width, width) * 0.1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x * torch.linspace(0.1, 10, x.shape[-1]), self.root)
        for block in self.blocks:
            x = block(x)
        return F.linear(x, self.root * self.gain) + F.linear(x, self.root.T)


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up = nn.Parameter(torch.randn(2 * width, width) * 0.1)
        self.up_bias = nn.Parameter(torch.randn(2 * width) * 0.1)
        self.down = nn.Parameter(torch.randn(width, 2 * width) * 0.1)
        self.square = nn.ParameterList(nn.Parameter(torch.randn(width, width) * 0.1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.linear(F.relu(F.linear(x, self.up, self.up_bias)), self.down)
        for weight in self.square:
            x = x + F.linear(x, weight)
        return x


class Ranks(nn.Module):
    """Linears on one vector, on rows, and on four dimensions."""

    def __init__(self, width: int = 64):
        super().__init__()
        torch.manual_seed(0)
        self.vector, self.rows, self.volume = (nn.Linear(width, width) for _ in range(3))

    def forward(self, vector: Tensor, rows: Tensor, volume: Tensor) -> Tensor:
        return self.volume(volume) + self.rows(rows) + self.vector(vector)


CASES: dict[str, tuple[type[nn.Module], tuple[tuple[int, ...], ...]]] = {
    "functional": (Functional, ((2, 6, 64),)),
    "ranks": (Ranks, ((64,), (6, 64), (2, 3, 6, 64))),
}


def case(name: str) -> tuple[nn.Module, list[dict[str, Tensor]]]:
    """A model and three samples for it."""
    kind, shapes = CASES[name]
    model, names = kind().eval(), list(inspect.signature(kind.forward).parameters)[1:]
    generator = torch.Generator().manual_seed(1)
    return model, [
        {key: torch.randn(shape, generator=generator) for key, shape in zip(names, shapes, strict=True)}
        for _ in range(3)
    ]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def exported(model: nn.Module, sample: dict[str, Tensor]) -> GraphModule:
    graph = export(model, (), sample).module()
    assert isinstance(graph, GraphModule)
    return graph


# --- names -----------------------------------------------------------------------------------------------------------


def test_every_linear_on_a_parameter_has_a_decision_of_its_own() -> None:
    quantizer = FP4DiTQuantizer().set_global(RECIPE)
    model, samples = case("functional")
    quantizer.annotate(exported(model, samples[0]))
    quantized = {name for name, decision in quantizer.decisions.items() if decision.config}
    parts = ("up", "down", "square.0", "square.1")
    assert quantized == {"root", *(f"blocks.{i}.{part}" for i in range(2) for part in parts)}
    kept = [decision.reason for decision in quantizer.decisions.values() if decision.config is None]
    assert kept == ["its weight is computed, not stored"] * 2


def test_rules_name_a_parameter_or_its_module() -> None:
    other, third = replace(RECIPE, weight="e1m2"), replace(RECIPE, weight="e3m0")
    quantizer = (
        FP4DiTQuantizer().set_global(RECIPE).set_module_name("blocks.0", None).set_module_name("blocks.1.up", other)
    )
    quantizer.set_module_name("blocks.1.square", third).set_module_name("blocks.1.square.0", None)
    model, samples = case("functional")
    quantizer.annotate(exported(model, samples[0]))
    found = {name: decision.config and decision.config.weight for name, decision in quantizer.decisions.items()}
    assert found["blocks.0.up"] is None and found["blocks.0.down"] is None
    assert found["blocks.1.up"] == "e1m2" and found["blocks.1.down"] == "e2m1"
    assert found["blocks.1.square.0"] is None and found["blocks.1.square.1"] == "e3m0"


@pytest.mark.parametrize("config", [RECIPE, STATIC], ids=["online", "static"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_lowered_graph_is_the_converted_one(name: str, config: QuantConfig) -> None:
    model, samples = case(name)
    prepared = prepare_pt2e(exported(model, samples[0]), FP4DiTQuantizer().set_global(config))
    calibrate(prepared, samples, progress=False)
    converted = convert_pt2e(prepared)
    found = converted(**samples[0])
    assert 0.01 < relative(found, model(**samples[0])) < 0.4
    assert relative(lower(converted)(**samples[0]), found) < 1e-5


@torch.no_grad()
def test_static_attention_at_the_root_is_quantized() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v)

    sample = {"x": torch.randn(2, 6, 64)}
    prepared = prepare_pt2e(exported(Root().eval(), sample), FP4DiTQuantizer().set_global(STATIC))
    calibrate(prepared, [sample], progress=False)
    converted = convert_pt2e(prepared)
    assert relative(lower(converted)(**sample), converted(**sample)) < 1e-5


# --- transforms and rounding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", [name for name in TRANSFORMS if name != "timestep_ranges"])
@torch.no_grad()
def test_every_transform_keeps_what_the_model_computes(name: str, method: str) -> None:
    model, samples = case(name)
    quantizer = FP4DiTQuantizer().set_global(RECIPE)
    graph = transform(capture(model, samples[0]), samples, [method], quantizer, progress=False)
    assert relative(graph(**samples[1]), model(**samples[1])) < 1e-5
    prepared = prepare_pt2e(graph, quantizer)
    calibrate(prepared, samples, progress=False)
    converted = convert_pt2e(prepared)
    assert relative(lower(converted)(**samples[0]), converted(**samples[0])) < 1e-5


@torch.no_grad()
def test_linears_on_parameters_of_one_module_are_not_split() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Module()
            self.block.first, self.block.second = (nn.Parameter(torch.randn(64, 64)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = F.linear(torch.cat([x, x.flip(-1)], -1), self.block.first)
            return F.linear(x, self.block.second)

    model, sample = Joined(), {"x": torch.randn(2, 6, 32)}
    graph = transform(capture(model, sample), [sample], ["split_inputs"], RECIPE, progress=False)
    assert relative(graph(**sample), model(**sample)) < 1e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("config", [RECIPE, replace(RECIPE, weight_search="weighted_mse")], ids=["absmax", "weighted"])
def test_gptq_takes_linears_on_parameters_and_inputs_of_any_rank(name: str, config: QuantConfig) -> None:
    model, samples = case(name)
    prepared = prepare_pt2e(exported(model, samples[0]), FP4DiTQuantizer().set_global(config))
    calibrate(prepared, samples, progress=False)
    report = reconstruct(prepared, samples, ReconstructionConfig("gptq"), progress=False)
    assert all(row.loss_after <= row.loss_before for row in report.rows)
    assert any(row.changed > 0 for row in report.rows)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_an_odd_number_of_inputs_is_refused_before_anything_is_done(granularity: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.even = nn.Linear(33, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.even(self.odd(x))

    model, sample = Odd().eval(), {"x": torch.randn(2, 6, 33)}
    config = replace(RECIPE, weight_granularity=granularity)
    with pytest.raises(
        ValueError, match=r"^odd: its 33 input features are odd.*share a byte.*set_module_name\('odd', None\)"
    ):
        prepare_pt2e(exported(model, sample), FP4DiTQuantizer().set_global(replace(config, indivisible="error")))
    with pytest.raises(ValueError, match=r"^odd: groups of 32 do not divide its 33 .* 'keep'$"):
        prepare_pt2e(exported(model, sample), FP4DiTQuantizer().set_global(replace(RECIPE, indivisible="error")))
    wide = replace(config, weight="int8", pre_gelu_weight=None, indivisible="error")
    for chosen, quantized in ((config, {"even"}), (wide, {"odd", "even"})):
        quantizer = FP4DiTQuantizer().set_global(chosen)
        converted = convert_pt2e(prepare_pt2e(exported(model, sample), quantizer))
        assert {name for name, decision in quantizer.decisions.items() if decision.config} == quantized
        assert relative(lower(converted)(**sample), converted(**sample)) < 1e-5


# --- graphs as users export them -------------------------------------------------------------------------------------


def test_decomposed_linears_are_refused_with_the_remedy() -> None:
    decomposed = export(TinyDiT().eval(), (), tiny_sample()).run_decompositions().module()
    with pytest.raises(
        ValueError, match=r"no linear, but products such as aten\.(add)?mm.* without run_decompositions"
    ):
        prepare_pt2e(decomposed, FP4DiTQuantizer().set_global(w4a6()))


class Matrices(nn.Module):
    """Products with stored matrices, which are no linears."""

    def __init__(self) -> None:
        super().__init__()
        self.right, self.turned, self.added, self.summed = (nn.Parameter(torch.randn(64, 64)) for _ in range(4))
        self.embedding, self.out = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.bias = nn.Parameter(torch.randn(64))
        self.register_buffer("table", torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        x = x @ self.right + x @ self.turned.T + torch.addmm(self.bias, x, self.added)
        x = torch.einsum("bd,df->bf", x, self.summed) @ self.table
        return torch.matmul(self.out(x), self.embedding.weight.transpose(0, 1))


def test_products_with_stored_matrices_are_listed_with_the_remedy() -> None:
    quantizer = FP4DiTQuantizer().set_global(RECIPE).set_module_name("turned", None)  # which is a name that it has
    quantizer.annotate(exported(Matrices().eval(), {"x": torch.randn(6, 64)}))
    left = {decision.name: decision.reason for decision in quantizer.decisions.values() if decision.config is None}
    assert set(left) == {"right", "turned", "added", "summed", "embedding"}
    assert all("call torch.nn.functional.linear" in reason for reason in left.values())
    assert [decision.name for decision in quantizer.decisions.values() if decision.config] == ["out"]


@pytest.mark.parametrize("einsum", [False, True], ids=["matmul", "einsum"])
def test_attention_by_separate_products_is_listed_with_the_remedy(einsum: bool) -> None:
    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(64, 192)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
            if einsum:
                scores = torch.einsum("bhqd,bhkd->bhqk", q, k)
                return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2)
            return F.dropout((q @ k.mT).softmax(-1), 0.1, self.training) @ v

    model = nn.Sequential(ByHand()).eval()
    quantizer = FP4DiTQuantizer().set_global(RECIPE)
    quantizer.annotate(exported(model, {"input": torch.randn(2, 6, 64)}))
    assert "call scaled_dot_product_attention" in quantizer.decisions["0"].reason


@torch.no_grad()
def test_blocks_of_a_graph_that_the_user_exported_are_outlined() -> None:
    model, sample = TinyDiT(layers=2).eval(), tiny_sample()
    converted = convert_pt2e(prepare_pt2e(exported(model, sample), FP4DiTQuantizer().set_global(w4a6())))
    lowered = lower(converted)
    outlined = outline(join_linears(lowered))  # what compile_blocks compiles
    assert list(kinds_of_blocks(outlined)) == ["block_0"]
    assert torch.equal(outlined(**sample)[0], lowered(**sample)[0])
    with pytest.raises(AssertionError, match=r"size\(\)\[0\] == 2"):
        outlined(**tiny_sample(batch=3))  # which the export's own check refuses


# --- calls that are wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["w4a6", w4a6, {"weight": "e2m1"}], ids=["name", "function", "dict"])
def test_a_rule_takes_configs_alone(wrong: object) -> None:
    quantizer = FP4DiTQuantizer()
    for setter, call in {
        "set_global": lambda: quantizer.set_global(wrong),
        "set_module_name": lambda: quantizer.set_module_name("*", wrong),
        "set_module_pattern": lambda: quantizer.set_module_pattern("*", wrong),
        "set_module_type": lambda: quantizer.set_module_type(nn.Linear, wrong),
    }.items():
        with pytest.raises(
            ValueError, match=rf"^{setter}: found .* for a config; give a QuantConfig, such as w4a6\(\)"
        ):
            call()


def test_a_rule_takes_names_and_classes() -> None:
    with pytest.raises(ValueError, match=r"set_module_name: found 3 for a name; give a text"):
        FP4DiTQuantizer().set_module_name(3, None)
    for wrong in ("Linear", nn.Linear(2, 2), int):
        with pytest.raises(ValueError, match=r"set_module_type\(.*give a class of modules, such as torch\.nn\.Linear"):
            FP4DiTQuantizer().set_module_type(wrong, None)


@torch.no_grad()
def test_a_graph_of_another_stage_is_refused() -> None:
    model, sample = TinyDiT().eval(), tiny_sample()
    graph = exported(model, sample)
    for call in (calibrate, reconstruct):
        with pytest.raises(
            ValueError, match=r"FP4DiTQuantizer; give it the result of prepare_pt2e, before convert_pt2e"
        ):
            call(graph, [sample], progress=False)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(w4a6()))
    with pytest.raises(ValueError, match=r"lower: this graph has observers .* convert_pt2e\(prepared\)"):
        lower(prepared)
    for call in (
        lower,
        compile_blocks,
        lambda model: calibrate(model, [sample]),
        lambda model: reconstruct(model, [sample]),
    ):
        with pytest.raises(ValueError, match=r"^\w+: found TinyDiT, which is no graph; give it the result of \w+"):
            call(model)
    with pytest.raises(ValueError, match=r"^transform: found TinyDiT, which is no graph"):
        transform(model, [sample], ["hadamard"])
    with pytest.raises(ValueError, match=r"^transform: this graph is prepared or quantized already"):
        transform(prepared, [sample], ["hadamard"])
    with pytest.raises(ValueError, match=r"^lower: nothing in this graph is quantized"):
        lower(exported(model, sample))
    with pytest.raises(ValueError, match=r"^capture: .* is a graph already: give it to prepare_pt2e"):
        capture(exported(model, sample), sample)
    with pytest.raises(ValueError, match=r"^capture: function is no module"):
        capture(lambda x: x, sample)
    with pytest.raises(ValueError, match=r"reconstruct: found config='gptq'; give ReconstructionConfig"):
        reconstruct(prepared, [sample], "gptq", progress=False)
    converted = convert_pt2e(prepared)
    for again in (converted, lower(converted)):
        lower(again)
        with pytest.raises(ValueError, match=r"^transform: this graph is prepared or quantized already"):
            transform(again, [sample], ["hadamard"])
    with pytest.raises(ValueError, match=r"calibrate: this graph has no observers"):
        calibrate(converted, [sample], progress=False)


def test_samples_that_are_no_dicts_are_refused() -> None:
    model, sample = TinyDiT().eval(), tiny_sample()
    positional = tuple(sample.values())
    with pytest.raises(
        ValueError,
        match=r"a dict of the keyword arguments of TinyDiT\.forward, found tuple; its keys are among hidden_",
    ):
        capture(model, positional)
    graph = capture(model, sample)
    with pytest.raises(ValueError, match=r"calibration sample 0 .*found tuple; give a dict"):
        transform(graph, [positional], ["hadamard"], w4a6(), progress=False)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(w4a6()))
    with pytest.raises(ValueError, match=r"calibration sample 0: a sample is a dict .* found tuple"):
        calibrate(prepared, [positional], progress=False)
    for samples in ([positional], sample):
        with pytest.raises(ValueError, match=r"found tuple.*hidden_states|must be a list of dicts"):
            reconstruct(prepared, samples, ReconstructionConfig("gptq"), progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[:1], r"hidden_states has shape \(1, 6, 4\), .* exported for 2×6×4: .*dynamic_shapes"),
        (lambda x: x[..., :3], r"hidden_states has shape \(2, 6, 3\), .* exported for 2×6×4: .*dynamic_shapes"),
        (Tensor.double, r"hidden_states is torch\.float64, .* exported with torch\.float32: cast it"),
    ],
    ids=["batch", "channels", "type"],
)
def test_a_sample_that_the_graph_cannot_take_is_named(change: Callable[[Tensor], Tensor], message: str) -> None:
    model, sample = TinyDiT().eval(), tiny_sample()
    wrong = sample | {"hidden_states": change(sample["hidden_states"])}
    prepared = prepare_pt2e(exported(model, sample), FP4DiTQuantizer().set_global(w4a6()))
    with pytest.raises(ValueError, match=rf"calibration sample 1: {message}"):
        calibrate(prepared, [sample, wrong], progress=False)
    with pytest.raises(ValueError, match=rf"reconstruct: {message}"):
        reconstruct(prepared, [wrong], ReconstructionConfig("gptq"), progress=False)


def test_the_module_form_is_for_models_of_diffusers() -> None:
    with pytest.raises(
        ValueError, match=r"models of diffusers, and TinyDiT is none .*; quantize its graph: prepare_pt2e"
    ):
        quantize_modules(TinyDiT())


# --- methods of a user's own -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("search", "found"),
    [
        (
            lambda weight, block, fmt, dtype: torch.ones(3),
            r"of shape \(3,\); it must return positive numbers of shape \(256, 4\)",
        ),
        (lambda weight, block, fmt, dtype: -torch.ones(256, 4), r"not all positive and finite; .* of shape \(256, 4\)"),
        (lambda weight, block, fmt, dtype: torch.full((256, 4), torch.nan), r"not all positive and finite"),
    ],
    ids=["shape", "negative", "nan"],
)
def test_scales_of_a_search_are_checked(monkeypatch: pytest.MonkeyPatch, search: object, found: str) -> None:
    observer = WeightObserver("e2m1", PerGroup(32), name="blocks.0.ff.up.weight")
    monkeypatch.setattr(observer, "find_scale", search)
    with pytest.raises(
        ValueError, match=rf"^weight blocks\.0\.ff\.up\.weight: the scale search 'absmax' found .*{found}"
    ):
        observer(torch.randn(256, 128))


class Mine(ClosedFormRounding):
    needs_hessian = False

    def __init__(self, change: Callable[[Tensor], object]):
        self.change = change

    def solve(self, weight: Tensor, grid: Grid, hessian: Tensor | None, name: str) -> Tensor:
        return self.change(grid.encode(weight))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda codes: codes[:1], r"torch\.uint8 \(1, 128\)"),
        (Tensor.float, r"torch\.float32 \(128, 128\)"),
        (lambda codes: codes + 200, r"the code 2\d\d"),
        (lambda codes: None, "NoneType"),
    ],
    ids=["shape", "type", "range", "nothing"],
)
def test_codes_of_a_rule_are_checked(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], object], found: str
) -> None:
    model, sample = TinyDiT().eval(), tiny_sample()
    prepared = prepare_pt2e(exported(model, sample), FP4DiTQuantizer().set_global(w4a6()))
    monkeypatch.setattr(ROUNDINGS, "find", lambda name: Mine(change))
    with pytest.raises(
        ValueError, match=rf"^blocks\.0\.attn\.to_\w+\.weight: Mine\.solve returned {found}; .* below 16, torch"
    ):
        reconstruct(prepared, [sample], ReconstructionConfig("gptq"), progress=False)


def test_a_checkpoint_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    model, sample = TinyDiT().eval(), tiny_sample()
    prepared = prepare_pt2e(exported(model, sample), FP4DiTQuantizer().set_global(w4a6()))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint_dir='.*file' is a file; give a folder"):
        reconstruct(prepared, [sample], ReconstructionConfig("gptq"), checkpoint_dir=tmp_path / "file", progress=False)
