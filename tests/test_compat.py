"""The adapter to private torch and torchao API does what the package relies on, whichever versions are installed."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils._sympy.functions import TruncToInt
from torchao.quantization import quantize_

from fp4dit_ao import MinifloatTensor, _compat
from fp4dit_ao._compat import compilation, graphs
from fp4dit_ao._compat.torchao_prototype import (
    DTYPE_FP6_E2M3,
    DTYPE_FP6_E3M2,
    MXTensor,
    NVFP4Tensor,
    QuantizeTensorToMXKwargs,
    QuantizeTensorToNVFP4Kwargs,
    ScaleCalculationMode,
    int4_cpu_config,
    int8_int4_config,
)  # fmt: skip
from fp4dit_ao.deploy.size_expressions import evaluate, readable


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(
        self,
        x: Tensor,
        time: dict[str, Tensor],
        scale: float | None = None,
        mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        y = self.fc(x) + time["step"] * time["weight"]
        return (y if mask is None else y * mask,)


def sample(batch: int = 2, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    x, step, weight = (torch.randn(batch, 4, generator=generator) for _ in range(3))
    return {"x": x, "time": {"step": step, "weight": weight}}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def graph(model: Model) -> GraphModule:
    kwargs = sample() | {"scale": None, "mask": None, "return_dict": False}
    auto = {0: Dim.AUTO}
    shapes = {"x": auto, "time": {"step": auto, "weight": auto}, "scale": None, "mask": None, "return_dict": None}
    exported = torch.export.export(model, (), kwargs, dynamic_shapes=shapes)
    return _compat.exported_graph(exported, {"scale": None, "mask": None, "return_dict": False})


# --- exported_graph --------------------------------------------------------------------------------------------------


def test_a_graph_is_called_as_its_module(model: Model, graph: GraphModule) -> None:
    for batch in (2, 1, 7):
        inputs = sample(batch)
        expected = model(**inputs)[0]
        assert torch.equal(graph(**inputs)[0], expected)
        assert torch.equal(graph(inputs["x"], inputs["time"])[0], expected)
        assert torch.equal(graph(**inputs, scale=None, return_dict=False)[0], expected)


def test_its_signature_has_the_modules_names_and_defaults(graph: GraphModule) -> None:
    parameters = inspect.signature(graph.forward).parameters
    assert list(parameters) == ["x", "time", "scale", "mask", "return_dict"]
    assert {n: p.default for n, p in parameters.items() if p.default is not p.empty} == {
        "scale": None, "mask": None, "return_dict": False,
    }  # fmt: skip
    with pytest.raises(TypeError, match="time"):
        graph(x=torch.zeros(2, 4))


def test_defaults_survive_an_edit_of_the_graph(model: Model, graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.op == "call_function":
            node.meta["edited"] = True
    graph.graph.lint()
    graph.recompile()
    inputs = sample(3)
    assert torch.equal(graph(**inputs)[0], model(**inputs)[0])


def test_input_names(graph: GraphModule) -> None:
    assert _compat.input_names(graph) == ["x", "time", "scale", "mask", "return_dict"]
    assert _compat.input_names(torch.fx.symbolic_trace(nn.Linear(2, 2))) == ["input"]


# --- flat_inputs -----------------------------------------------------------------------------------------------------


def test_flat_inputs_are_the_placeholders_values(model: Model, graph: GraphModule) -> None:
    """Checked by running the nodes from them, without the graph's own calling convention."""
    inputs = sample(5)
    values = _compat.flat_inputs(graph, inputs)
    assert list(values) == [node.name for node in graph.graph.nodes if node.op == "placeholder"]
    assert values["x"] is inputs["x"]
    assert sum(value is inputs["time"]["step"] for value in values.values()) == 1
    interpreter = torch.fx.Interpreter(graph)
    ran = interpreter.run(*values.values(), enable_io_processing=False)
    assert torch.equal(ran[0], model(**inputs)[0])


def test_the_order_of_keywords_does_not_matter(graph: GraphModule) -> None:
    inputs = sample()
    turned = {"return_dict": False, "time": dict(reversed(inputs["time"].items())), "x": inputs["x"]}
    first, second = (_compat.flat_inputs(graph, s) for s in (inputs, turned))
    assert all(first[name] is second[name] for name in first)


def test_samples_that_do_not_fit_the_signature(graph: GraphModule) -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        _compat.flat_inputs(graph, {"time": sample()["time"]})
    with pytest.raises(TypeError, match="unexpected keyword argument 'extra'"):
        _compat.flat_inputs(graph, sample() | {"extra": None})


def test_samples_of_another_structure(graph: GraphModule) -> None:
    with pytest.raises(ValueError, match="expected 2, but got 1"):
        _compat.flat_inputs(graph, sample() | {"time": {"step": torch.zeros(2, 4)}})


# --- exporting again -------------------------------------------------------------------------------------------------


def test_captured_sizes(graph: GraphModule) -> None:
    sizes = _compat.captured_sizes(graph)
    assert sizes["x"] == [2, 4]
    assert list(sizes.values()) == [[2, 4]] * 3


def test_without_guards_the_examples_proportions_do_not_matter() -> None:
    class Picture(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) if x.shape[1] != x.shape[2] else x.flatten(1).clone()

    shapes = ({0: Dim.AUTO, 1: Dim.AUTO, 2: Dim.AUTO},)
    exported = torch.export.export(Picture(), (torch.zeros(2, 4, 6),), dynamic_shapes=shapes)
    square = torch.rand(3, 5, 5)
    assert torch.equal(_compat.without_guards(exported).module()(square), square.flatten(1))


# --- the rest --------------------------------------------------------------------------------------------------------


def test_relations_are_what_a_view_hides_and_no_accident_of_the_example() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, text: Tensor) -> Tensor:
            bias = mask.repeat_interleave(2, dim=0).view(x.shape[0], 2, -1, mask.shape[1])
            text = text * 2 if x.shape[1] > x.shape[2] else text  # true of the example
            return x.unsqueeze(1) * bias + text.view(x.shape[0], 1, -1, 1)

    example = (torch.randn(3, 8, 4), torch.randn(3, 4), torch.randn(6, 4))
    shapes = tuple(dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for x in example)
    with _compat.distinct_sizes():
        exported = torch.export.export(Masked(), example, dynamic_shapes=shapes)
    relations = _compat.size_relations(_compat.without_guards(exported))
    inputs = [n.meta["val"] for n in exported.graph.nodes if n.name in exported.graph_signature.user_inputs]
    hints = {str(size): size.node.hint for x in inputs for size in x.shape}
    (batch, rows, _), (masks, _), (texts, width) = ([str(size) for size in x.shape] for x in inputs)
    other = hints | {batch: 5, rows: 3, masks: 5, texts: 5, width: 3}
    assert relations
    assert all(evaluate(relation, sizes) for relation in relations for sizes in (hints, other))
    for wrong in ({masks: 1}, {masks: 6}, {masks: 10}, {texts: 4}, {width: 4}):
        assert not all(evaluate(relation, other | wrong) for relation in relations), wrong
    half = sympy.Symbol("s1", integer=True, positive=True) / sympy.Integer(2)
    assert not readable(graphs._python(sympy.Eq(TruncToInt(half), 2))), (
        "what no arithmetic of sizes says must not be misread"
    )
    static = torch.export.export(nn.Linear(2, 2), (torch.zeros(3, 2),))
    assert _compat.size_relations(static) == []


def test_buffers_stand_beside_the_weight_under_unique_names() -> None:
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    with traced.graph.inserting_before():
        nodes = [
            _compat.create_buffer_node(traced, path, torch.ones(2)) for path in ("0.codes", "0.codes", "a.b.c", "top")
        ]
    assert [node.target for node in nodes] == ["0.codes", "0.codes_1", "a.b.c", "top"]
    assert {"0.codes", "0.codes_1", "a.b.c", "top"} <= set(traced.state_dict())
    assert all(node.op == "get_attr" for node in nodes)
    traced.graph.lint()


def test_a_buffer_carries_no_gradient() -> None:
    traced = torch.fx.symbolic_trace(nn.Linear(2, 2))
    weight = torch.ones(2, requires_grad=True) * 2
    _compat.create_buffer_node(traced, "scale", weight)
    assert not traced.scale.requires_grad


def test_fake_tensors_hold_nothing_and_claim_the_cpu() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = _compat.fake_like(torch.ones(3, 5), mode, torch.bfloat16)
        product = fake @ torch.empty(5, 7, dtype=torch.bfloat16)
    assert isinstance(fake, FakeTensor)
    assert (fake.shape, fake.dtype, fake.device) == ((3, 5), torch.bfloat16, torch.device("cpu"))
    assert product.shape == (3, 7)


@pytest.mark.parametrize("low_bit", [False, True])
def test_copies_of_fake_tensors_have_their_mode(low_bit: bool) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        traced = torch.fx.symbolic_trace(nn.Linear(64, 64))
        weight = MinifloatTensor.from_hp(torch.randn(64, 64), [1, 32], "e2m1") if low_bit else torch.randn(64, 64)
        traced.weight = nn.Parameter(weight, requires_grad=False)
        constant = torch.tensor(3.0)  # whose storage the mode knows by a weak reference
        copied = _compat.copied(traced, {})
    parts = [copied.weight.qdata, copied.weight.scale] if low_bit else [copied.weight]
    for part in (*parts, copied.bias):
        assert isinstance(part, FakeTensor)
        assert part.fake_mode is mode
    assert copied.weight is not traced.weight
    assert constant.constant is not None


@pytest.mark.parametrize(
    ("args", "kwargs", "expected"),
    [
        ((), {"dtype": torch.float16}, (None, torch.float16)),
        (("cpu",), {}, (torch.device("cpu"), None)),
        (("cuda:1", torch.bfloat16), {}, (torch.device("cuda", 1), torch.bfloat16)),
        ((torch.zeros(1, dtype=torch.float64),), {}, (torch.device("cpu"), torch.float64)),
    ],
    ids=str,
)
def test_arguments_of_module_to(args: tuple, kwargs: dict, expected: tuple) -> None:
    assert _compat.parse_to(*args, **kwargs) == expected


@pytest.mark.parametrize(("context", "expected"), [(contextlib.nullcontext, 2), (_compat.distinct_sizes, 1)])
def test_equal_sizes_are_not_taken_to_be_one(context: Callable, expected: int) -> None:
    """A graph compiled on a square image also serves an oblong one, without a second compilation."""
    compilations = []

    def backend(graph: GraphModule, example: list) -> GraphModule:
        compilations.append(graph)
        return graph

    compiled = torch.compile(lambda x: x * 2, backend=backend, dynamic=True, fullgraph=True)
    with context():
        for shape in [(6, 6), (4, 8), (9, 3)]:
            assert compiled(torch.ones(shape)).shape == shape
    assert len(compilations) == expected


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize("mode", [_compat.sizes_of_repeats, compilation._ExpandedRepeats])
def test_repeated_sizes_stay_symbolic(mode: Callable, dim: int | None) -> None:
    class Repeats(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            counts = torch.tensor([1, 2])
            size = x.numel() * 3 if dim is None else x.shape[dim] * 3
            method = x.repeat_interleave(3, dim=dim, output_size=size)
            function = torch.repeat_interleave(x, repeats=3, dim=dim)
            return method, function, torch.repeat_interleave(torch.ones(2), counts, output_size=3)

    with mode():
        exported = torch.export.export(
            Repeats(), (torch.zeros(2, 3, 4),), dynamic_shapes=(dict.fromkeys(range(3), Dim.AUTO),)
        )
    for shape in [(2, 3, 4), (5, 6, 7), (3, 2, 2)]:
        x = torch.randn(shape)
        for ours, expected in zip(exported.module()(x), Repeats()(x), strict=True):
            assert torch.equal(ours, expected)


def test_operators_in_packages_get_the_types_that_they_were_called_with(tmp_path: Path) -> None:
    types = (torch.float16, torch.float32, torch.bfloat16)

    @torch.library.custom_op("fp4dit_test::cast", mutates_args=())
    def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype)

    cast.register_fake(lambda x, dtype: torch.empty_like(x, dtype=dtype))

    class Casts(nn.Module):
        def forward(self, x: Tensor) -> list[Tensor]:
            return [cast(x, dtype) for dtype in types]

    x = torch.randn(4, 8, dtype=torch.float64)  # an operator must not return its input, as a cast to its type would
    with torch.no_grad(), _compat.types_in_packages():
        _compat.compile_package(
            torch.export.export(Casts(), (x,)), tmp_path / "m.pt2", {"aot_inductor.metadata": {"a": "b"}}
        )
    package = _compat.load_package(tmp_path / "m.pt2")
    assert package.get_metadata()["a"] == "b"
    for dtype, y in zip(types, package(x), strict=True):
        assert torch.equal(y, x.to(dtype))
        assert y.dtype == dtype


def test_what_packaging_changes_is_back_afterwards() -> None:
    from torch._export.serde import serialize
    from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu

    def state() -> tuple[dict, dict]:
        return dict(serialize._TORCH_TO_SERIALIZE_DTYPE), {
            name: getattr(CppWrapperCpu, name) for name in dir(CppWrapperCpu)
        }

    before = state()
    with pytest.raises(KeyboardInterrupt), _compat.types_in_packages():
        raise KeyboardInterrupt
    assert state() == before


def test_a_value_is_traced_only_inside_of_compilation() -> None:
    seen = []

    @torch.library.custom_op("fp4dit_test::look", mutates_args=())
    def look(x: Tensor) -> Tensor:
        seen.append(_compat.is_traced(x))
        return x.clone()

    look(torch.ones(2))
    assert seen == [False]

    library = torch.library.Library("fp4dit_test", "FRAGMENT")
    library.define("inside(Tensor x) -> Tensor")
    library.impl("inside", lambda x: (seen.append(_compat.is_traced(x)), x + 1)[1], "CompositeImplicitAutograd")
    torch.compile(lambda x: torch.ops.fp4dit_test.inside(x * 2), backend="aot_eager", fullgraph=True)(torch.ones(2))
    assert True in seen


def test_dynamic_sizes_have_their_examples_as_hints() -> None:
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.extend((type(size), _compat.size_hint(size)) for size in (*x.shape, x.numel()))
        return x + 1

    library = torch.library.Library("fp4dit_test", "FRAGMENT")
    library.define("sizes(Tensor x) -> Tensor")
    library.impl("sizes", look, "CompositeImplicitAutograd")
    torch._dynamo.reset()
    run = torch.compile(torch.ops.fp4dit_test.sizes, backend="aot_eager", dynamic=True, fullgraph=True)
    run(torch.ones(3, 5))
    assert {(torch.SymInt, 3), (torch.SymInt, 5), (torch.SymInt, 15)} <= set(seen)
    assert _compat.size_hint(7) == 7


def test_static_sizes_are_compiled_in() -> None:
    def compilations(static: bool) -> int:
        compiled = []

        def backend(graph: GraphModule, example: list) -> GraphModule:
            compiled.append(graph)
            return graph

        torch._dynamo.reset()
        run = torch.compile(lambda x, w: x @ w, backend=backend, dynamic=True, fullgraph=True)
        for features in (4, 6):
            weight = torch.ones(8, features)
            if static:
                _compat.mark_static(weight)
            assert run(torch.ones(3, 8), weight).shape == (3, features)
        return len(compiled)

    assert [compilations(False), compilations(True)] == [1, 2]


def test_whole_numbers_that_may_vary_are_told_from_constants() -> None:
    class Rows(torch.nn.Module):
        def forward(self, x: torch.Tensor, rows: int, scale: float = 2.0) -> torch.Tensor:
            return x.reshape(rows, -1) * scale

    from fp4dit_ao import capture

    graph = capture(Rows(), {"x": torch.randn(24), "rows": 6, "scale": 3.0})
    assert _compat.varying_numbers(graph) == {"rows"}
    x = torch.randn(40)
    assert torch.equal(graph(x, 5, 3.0), x.reshape(5, 8) * 3)


@pytest.mark.parametrize("cls", [MinifloatTensor, MXTensor, NVFP4Tensor])
def test_a_torchao_tensor_is_made_of_its_parts(cls: Any) -> None:
    parameters = list(inspect.signature(cls.__new__).parameters.values())[1:]
    assert _compat.parts(cls) == [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]


def test_buffers_enter_a_state_dict_and_leave_it_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Module())
    model.register_buffer("root", torch.ones(1), persistent=False)
    model[1].register_buffer("inner", torch.ones(1), persistent=False)
    model[1].register_buffer("other", torch.ones(1), persistent=False)
    before = set(model.state_dict())
    changed = _compat.make_buffers_persistent(model, {"root", "1.inner"})
    assert set(model.state_dict()) == before | {"root", "1.inner"}
    _compat.make_buffers_transient(changed)
    assert set(model.state_dict()) == before


def test_torchao_quantizes_to_int4_on_cpus() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 64)).bfloat16()
    x = torch.randn(8, 256, dtype=torch.bfloat16)
    expected = model(x).float()
    config = int4_cpu_config(group_size=128)
    assert config.group_size == 128
    quantize_(model, dataclasses.replace(config, set_inductor_config=False))
    error = (model(x).float() - expected).norm() / expected.norm()
    assert 0.01 < error < 0.2


# --- tensors ---------------------------------------------------------------------------------------------------------


def test_a_wrapper_reports_what_it_is_told_and_holds_nothing() -> None:
    class Wrapper(Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError(func)

    made = _compat.wrapper_tensor(Wrapper, [3, 5], torch.bfloat16, torch.device("meta"), requires_grad=True)
    assert (type(made), made.shape, made.dtype) == (Wrapper, (3, 5), torch.bfloat16)
    assert made.requires_grad
    assert made.device.type == "meta"


def test_whether_a_cpu_multiplies_bfloat16_is_what_the_system_says() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    named = {"avx512_bf16", "amx_bf16", "bf16"} & set(flags)
    if named or "avx512bw" not in flags:  # with AVX-512 alone, oneDNN emulates it in a way that it counts as its own
        assert _compat.cpu_multiplies_bfloat16() == bool(named)


def test_whether_a_cpu_multiplies_int8_is_what_the_system_says() -> None:
    flags = Path("/proc/cpuinfo").read_text().split()
    assert _compat.cpu_multiplies_int8() == ("avx512_vnni" in flags)


def test_products_of_int8_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8) for shape in [(32, 64), (64, 16)])
    product = _compat.int8_product(x, y)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), x.long() @ y.long())


def test_products_of_fp8_have_row_wise_scales() -> None:
    """On the CPU with bfloat16 out, where the sum is rounded once; on a GPU it is the same function."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randint(-16, 17, (16, 32), generator=generator).float() for _ in range(2))
    x_scale, w_scale = torch.rand(16, 1, generator=generator) + 1, torch.rand(1, 16, generator=generator) + 1
    eights = (x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn).T)
    expected = (x @ w.T) * x_scale * w_scale
    got = _compat.fp8_product(*eights, x_scale, w_scale, torch.bfloat16).float()
    assert (got - expected).norm() <= 2**-8 * expected.norm()


def test_a_version_counts_changes_in_place() -> None:
    x = torch.zeros(2)
    before = _compat.version(x)
    _ = x + 1
    assert _compat.version(x) == before
    x.add_(1)
    assert _compat.version(x) > before


def test_views_are_told_from_tensors_of_their_own() -> None:
    x = torch.zeros(2, 3)
    assert not _compat.is_view_of_another(x)
    assert _compat.is_view_of_another(x[:1])
    assert _compat.is_view_of_another(x.expand(4, 2, 3))
    aten = torch.ops.aten
    assert _compat.is_view(aten.slice.Tensor) and _compat.is_view(aten.add_.Tensor)
    assert not _compat.is_view(aten.add.Tensor)
    assert _compat.is_view(len), "a plain function may do anything"


def test_many_tensors_move_towards_others() -> None:
    targets, sources = [torch.zeros(2), torch.ones(3)], [torch.full((2,), 4.0), torch.full((3,), 5.0)]
    _compat.lerp_(targets, sources, 0.25)
    assert [x.tolist() for x in targets] == [[1.0] * 2, [2.0] * 3]


def test_slots_are_the_modules_own_dictionaries() -> None:
    norm = nn.BatchNorm1d(2)
    parameters, buffers = _compat.slots(norm)
    assert list(parameters) == ["weight", "bias"]
    assert list(buffers) == ["running_mean", "running_var", "num_batches_tracked"]
    parameters["weight"] = nn.Parameter(torch.full((2,), 7.0))
    buffers["running_mean"] = torch.ones(2)
    assert norm.weight.tolist() == [7.0] * 2
    assert norm.running_mean.tolist() == [1.0] * 2
    assert list(dict(norm.named_parameters())) == ["weight", "bias"]


def test_a_rewritten_graph_is_called_as_the_one_before(model: Model, graph: GraphModule) -> None:
    from torch.fx import Graph

    copied = Graph()
    copied.output(copied.graph_copy(graph.graph, {}))
    _compat.copy_calling_convention(copied, graph.graph)
    again = GraphModule(graph, copied)
    inputs = sample(3)
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    assert _compat.input_names(again) == _compat.input_names(graph)


def test_trees_are_mapped_over_their_leaves() -> None:
    tree = {"a": [1, (2, 3)], "b": "x"}
    assert _compat.pytree.tree_map_only(int, lambda x: x + 1, tree) == {"a": [2, (3, 4)], "b": "x"}
    assert _compat.pytree.tree_leaves(tree) == [1, 2, 3, "x"]


# --- diffusers -------------------------------------------------------------------------------------------------------


def test_settings_of_progress_bars_can_be_given_back() -> None:
    from diffusers import DDIMScheduler, DiffusionPipeline

    pipe = DiffusionPipeline()
    pipe.register_modules(scheduler=DDIMScheduler())
    assert _compat.progress_bar_config(pipe) == {}
    pipe.set_progress_bar_config(desc="x")
    before = _compat.progress_bar_config(pipe)
    pipe.set_progress_bar_config(disable=True)
    assert before == {"desc": "x"} != _compat.progress_bar_config(pipe)
    pipe.set_progress_bar_config(**before)
    assert _compat.progress_bar_config(pipe) == before


def test_a_models_config_methods_and_blocks_are_replaced() -> None:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_layers=1, num_attention_heads=1, attention_head_dim=8, cross_attention_dim=8, caption_channels=8,
        in_channels=4, out_channels=8, sample_size=8, use_additional_conditions=False,
    )  # fmt: skip
    _compat.replace_config(model, type(model.config)({"only": 1}))
    assert dict(model.config) == {"only": 1}
    assert model.config.only == 1
    own = type(model)._repeated_blocks
    assert _compat.repeated_block_names(model) == tuple(own or ())
    _compat.name_repeated_blocks(model, ["B", "A", "B"])
    assert model._repeated_blocks == (own or ["A", "B"])
    seen = []
    _compat.replace_apply(model, lambda convert, recurse=True: seen.append(convert) or model)
    model.double()
    assert len(seen) == 1 and next(model.parameters()).dtype == torch.float32
    _compat.replace_apply(model, None)
    model.double()
    assert len(seen) == 1 and next(model.parameters()).dtype == torch.float64


def test_buffers_are_told_by_whether_they_are_saved() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("transient", torch.zeros(1), persistent=False)
    assert _compat.is_persistent(module, "kept")
    assert not _compat.is_persistent(module, "transient")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_prepacked_linears_compute_the_linear() -> None:
    x, weight, bias = torch.randn(5, 32).bfloat16(), torch.randn(7, 32).bfloat16(), torch.randn(7).bfloat16()
    if torch.backends.cpu.get_cpu_capability() == "AVX2":  # callers then go without it
        with pytest.raises(RuntimeError, match="bf16"):
            _compat.prepacked_linear(x, weight, bias)()
        x, weight, bias = x.float(), weight.float(), bias.float()
    wanted = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(_compat.prepacked_linear(x, weight, bias)(), wanted)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
def test_prepacked_int8_linears_compute_the_product_times_the_rows_scales() -> None:
    tokens, levels = (torch.randint(-60, 61, size, dtype=torch.int8) for size in ((5, 32), (7, 32)))
    scale = torch.tensor([2.0**-n for n in range(7)])
    wanted = (tokens.long() @ levels.long().T) * scale
    found = _compat.prepacked_int8_linear(tokens, levels, scale, torch.float32)()
    assert torch.equal(found, wanted)
    assert torch.equal(_compat.prepacked_int8_linear(tokens, levels, scale, torch.bfloat16)(), wanted.bfloat16())


def test_sizes_are_known_for_another_call(graph: GraphModule) -> None:
    values = _compat.symbol_values(graph, sample(7))
    [linear] = [node for node in graph.graph.nodes if node.target is torch.ops.aten.linear.default]
    rows = linear.meta["val"].shape[0]
    assert _compat.symbols_in(rows) <= values.keys() and _compat.symbols_in(4) == set()
    assert (_compat.size_with(rows, values), _compat.size_with(4, values)) == (7, 4)
    assert _compat.size_with(rows, {}) == rows.node.hint


# --- torchao's prototypes --------------------------------------------------------------------------------------------


def test_block_formats_have_the_names_that_the_weights_use() -> None:
    assert (DTYPE_FP6_E2M3, DTYPE_FP6_E3M2) == ("fp6_e2m3", "fp6_e3m2")
    assert issubclass(MXTensor, Tensor) and issubclass(NVFP4Tensor, Tensor)
    assert ScaleCalculationMode.RCEIL.name == "RCEIL"
    assert QuantizeTensorToNVFP4Kwargs(use_dynamic_per_tensor_scale=True).use_dynamic_per_tensor_scale
    assert "block_size" in inspect.signature(QuantizeTensorToMXKwargs).parameters


def test_torchaos_config_of_int8_by_int4_has_its_group() -> None:
    assert int8_int4_config(64).group_size == 64


def test_hooks_that_move_weights_are_found() -> None:
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert _compat.offloading_hook(model) is None
    add_hook_to_module(model, AlignDevicesHook(execution_device="cpu"))
    assert _compat.offloading_hook(model) is None  # which sends inputs, no weights
    remove_hook_from_module(model)
    cpu_offload(model, torch.device("cpu"))
    assert _compat.offloading_hook(model) == "AlignDevicesHook"
    remove_hook_from_module(model, recurse=True)
    cpu_offload_with_hook(model, "cpu")
    assert _compat.offloading_hook(model) == "CpuOffload"


def test_a_compiled_copy_is_known_from_a_model_compiled_in_place() -> None:
    model = torch.nn.Linear(2, 2)
    assert _compat.is_compiled_copy(torch.compile(model))
    model.compile()
    assert not _compat.is_compiled_copy(model)


def test_components_are_added_to_what_from_pipe_is_given() -> None:
    from diffusers import DiffusionPipeline

    class Made(DiffusionPipeline):  # type: ignore[misc]
        def __init__(self, one: object = None):
            super().__init__()
            self.one = one

        @classmethod
        def from_pipe(cls, pipeline: object, **kwargs: object) -> object:
            return kwargs

    def passed(pipe: object, expected: object) -> dict[str, object]:
        return {"one": pipe, "two": 2}

    _compat.before_from_pipe(Made, passed)
    _compat.before_from_pipe(Made, passed)
    assert Made.from_pipe("pipe", two=3) == {"one": "pipe", "two": 3}
    assert Made.from_pipe("pipe", custom_pipeline="other") == {"custom_pipeline": "other"}


def test_what_from_pipe_makes_is_changed_once() -> None:
    from diffusers import DiffusionPipeline

    class Base(DiffusionPipeline):  # type: ignore[misc]
        @classmethod
        def from_pipe(cls, pipeline: object, **kwargs: object) -> object:
            return cls.__name__, pipeline, kwargs

    class Made(Base):
        pass

    def change(given: object, made: object) -> object:
        return given, made

    _compat.before_from_pipe(Base, lambda pipe, expected: {"one": 1})
    _compat.after_from_pipe(Base, change)
    _compat.after_from_pipe(Base, change)
    assert Made.from_pipe("pipe", two=2) == ("pipe", ("Made", "pipe", {"one": 1, "two": 2}))
