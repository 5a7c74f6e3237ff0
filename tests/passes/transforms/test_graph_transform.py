"""The plug-in point: any transform by name, its record in the graph's meta, order and idempotence."""

from collections.abc import Iterator, Mapping, Sequence
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, lower, transform
from fp4dit_ao.graph_capture.transforming import resolve_transforms
from fp4dit_ao.passes.block_outlining import outline
from fp4dit_ao.passes.transforms import registry
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform, Record, records_of
from fp4dit_ao.passes.transforms.low_rank import LowRank
from fp4dit_ao.passes.transforms.registry import TRANSFORMS, applied_transforms
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant
from fp4dit_ao.passes.transforms.split_inputs import SplitInputs
from tests.graphs import show


class Negate(GraphTransform):
    """Negates a linear's weight, and its output twice: the smallest change that data, names and tensors take part in."""

    name = "negate"
    needs_data = True

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fitted: list[int] = []

    def fit(self, graph: GraphModule, samples: Sequence[Mapping[str, Any]]) -> None:
        assert self.quantizer is not None
        self.names, self.fitted = ["fc"], [len(samples), show(graph).count("= neg(")]

    def rewrite(self, graph: GraphModule) -> None:
        for node in list(graph.graph.nodes):
            if node.target is torch.ops.aten.linear.default:
                with graph.graph.inserting_after(node):
                    once = graph.graph.call_function(torch.ops.aten.neg.default, (node,))
                node.replace_all_uses_with(once, delete_user_cb=lambda user, once=once: user is not once)
                with graph.graph.inserting_after(once):
                    twice = graph.graph.call_function(torch.ops.aten.neg.default, (once,))
                once.replace_all_uses_with(twice, delete_user_cb=lambda user, twice=twice: user is not twice)
                once.meta = twice.meta = dict(node.meta)

    def apply_to_modules(self, model: nn.Module) -> None:
        raise NotImplementedError

    def to_record(self) -> Record:
        return {"names": self.names}

    @classmethod
    def from_record(cls, record: Record) -> "Negate":
        found = cls()
        found.names = record["names"]
        return found


@pytest.fixture
def negate(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(TRANSFORMS, "_methods", dict(TRANSFORMS))
    monkeypatch.setattr(TRANSFORMS, "_infos", dict(TRANSFORMS._infos))
    TRANSFORMS.register("negate", Negate, summary="Negates twice.")
    yield


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(128, elementwise_affine=False), nn.Linear(256, 128)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(torch.cat([self.norm(x), y + self.norm(y)], -1))


SAMPLE = {"x": torch.randn(3, 4, 128), "y": torch.randn(3, 4, 128)}
CONFIG = QuantConfig(pre_gelu_weight=None, skip=())


@pytest.mark.usefixtures("negate")
@torch.no_grad()
def test_a_transform_of_ones_own_by_name() -> None:
    model = Joined().eval()
    graph = capture(model, SAMPLE)
    assert records_of(graph) == []
    assert transform(graph, [SAMPLE, SAMPLE], ["negate", "split_inputs"], progress=False) is graph
    assert records_of(graph) == [
        {"name": "negate", "names": ["fc"]}, {"name": "split_inputs", "parts": {"fc": [128, 128]}},
    ]  # fmt: skip
    found = [line.split(" = ")[-1] for line in show(graph).splitlines()]
    assert found[found.index("self.fc.part0.weight") : -1] == [
        "self.fc.part0.weight",
        "slice.Tensor(cat, -1, 0, 128)",
        "linear(slice_tensor, fc_part0_weight, fc_bias)",
        "self.fc.part1.weight",
        "slice.Tensor(cat, -1, 128, 256)",
        "linear(slice_tensor_1, fc_part1_weight)",
        "add.Tensor(linear_default, linear_default_1)",
        "neg(add_tensor)",
        "neg(neg_default)",
    ]
    torch.testing.assert_close(graph(**SAMPLE), model(**SAMPLE))


@pytest.mark.usefixtures("negate")
@torch.no_grad()
def test_the_record_goes_through_every_stage_and_is_replayed() -> None:
    model = Joined().eval()
    graph = transform(capture(model, SAMPLE), [SAMPLE], ["negate"], CONFIG, progress=False)
    config = QuantConfig(pre_gelu_weight=None, skip=(), split_inputs=True)
    prepared = prepare_pt2e(graph, FP4DiTQuantizer().set_global(config))
    expected = [{"name": "negate", "names": ["fc"]}, {"name": "split_inputs", "parts": {"fc": [128, 128]}}]
    assert records_of(prepared) == expected
    lowered = lower(convert_pt2e(prepared))
    assert records_of(lowered) == records_of(outline(lowered)) == expected
    fresh = capture(model, SAMPLE)
    for found in applied_transforms(lowered):
        found.apply(fresh)
        found.apply(fresh)
    assert records_of(fresh) == expected
    assert show(fresh).count("neg") == show(lowered).count("neg")
    assert show(fresh).count("linear(") == 2
    torch.testing.assert_close(fresh(**SAMPLE), model(**SAMPLE))


@pytest.mark.usefixtures("negate")
def test_each_is_fitted_to_what_the_one_before_left() -> None:
    methods = [Negate(), Negate()]
    methods[1].to_record = lambda: {"names": ["other"]}  # type: ignore[method-assign]
    graph = transform(capture(Joined().eval(), SAMPLE), [SAMPLE], methods, CONFIG, progress=False)
    assert [method.fitted for method in methods] == [[1, 0], [1, 2]]
    assert show(graph).count("= neg(") == 4
    assert all(method.quantizer is None for method in methods), "lent for the time of fitting"


@torch.no_grad()
def test_only_what_is_quantized_is_split() -> None:
    model = Joined().eval()
    kept = FP4DiTQuantizer().set_global(CONFIG).set_module_name("fc", None)
    for quantizer, parts in ((kept, {}), (CONFIG, {"fc": [128, 128]}), (None, {"fc": [128, 128]})):
        method = SplitInputs()
        graph = transform(capture(model, SAMPLE), [], [method], quantizer, progress=False)
        assert method.parts == parts
        torch.testing.assert_close(graph(**SAMPLE), model(**SAMPLE))
    for parts, message in (
        ({"other": [1, 2]}, "no linear other, which was split"),
        ({"fc": [1, 2]}, "has 256 input features"),
    ):
        with pytest.raises(ValueError, match=message):
            SplitInputs.from_record({"parts": parts}).apply(capture(model, SAMPLE))


def test_a_name_may_carry_options() -> None:
    low_rank, smooth = resolve_transforms(["low_rank:rank=8,rows=64", "smoothquant:fold=true"])
    assert isinstance(low_rank, LowRank) and (low_rank.rank, low_rank.rows, low_rank.rounds) == (
        8,
        64,
        LowRank().rounds,
    )
    assert isinstance(smooth, SmoothQuant) and smooth.fold
    for name, made in registry.TRANSFORMS.items():  # every number that a constructor takes is an option
        options = {p.name: p.default for p in signature(made).parameters.values() if isinstance(p.default, int | float)}
        text = ",".join(f"{option}={str(value).lower()}" for option, value in options.items())
        found = registry.transform_named(f"{name}:{text}")
        assert vars(found).keys() == vars(made()).keys()
        assert all(vars(found)[option] == value for option, value in options.items() if option in vars(found))


def test_wrong_transforms_are_refused() -> None:
    graph = capture(Joined().eval(), SAMPLE)
    for wrong, message in [
        (["sharpen"], "unknown transform 'sharpen'; choose one of smoothquant, "),
        ("smoothquant", r"transforms='smoothquant'; give a list, such as \['smoothquant'\]"),
        (
            ["low_rank:size=8"],
            "'low_rank:size=8': transform 'low_rank' has no option 'size'; it has rank, rounds, rows",
        ),
        (["low_rank:rank=few"], "rank takes a whole number, found 'few'"),
        (["smoothquant:fold=1"], "fold takes true or false, found '1'"),
        (["weight_equalization:rank=8"], "it has none"),
        (["low_rank:rank=0"], "rank must be at least 1"),
        ([3], r"a transform is a name \(smoothquant, .*\) or a GraphTransform object, found int"),
    ]:
        with pytest.raises(ValueError, match=message):
            transform(graph, [SAMPLE], wrong, progress=False)
    assert records_of(graph) == []
    assert all(info.point == "transform" and info.source and info.cost for info in registry.TRANSFORMS.infos())
