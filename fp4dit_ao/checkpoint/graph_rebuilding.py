"""A quantized graph without its weights: built anew from a model's config, so that nothing needs to be unpickled.

Capture, annotate, convert and lower run on fake tensors (shapes and types, no memory), by the same code that made the graph
in the first place; then stored codes, scales and float tensors take the fake ones' places. The cost is one ``torch.export``.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import capture
from fp4dit_ao.graph_capture.sample_description import Description
from fp4dit_ao.observers import StaticActivationObserver, WeightObserver
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.graph_products import weight_named
from fp4dit_ao.passes.lowering import lower
from fp4dit_ao.passes.transforms.annotated_linears import linear_name
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.quantizer import Decision, FP4DiTQuantizer


def resolve(decisions: Iterable[Decision], graph: nn.Module) -> list[Decision]:
    """The decisions with configs that no longer depend on data or on the graph around a layer.

    Args:
        decisions: of the quantizer that annotated the graph.
        graph: the lowered graph; formats that were searched for are read off its tensors and nodes.
    """
    weights, inputs = dict(graph.named_parameters()), _static_formats(graph)
    resolved = []
    for decision in decisions:
        config = decision.config
        if config is not None:
            weight = weight_named(weights, decision.name)
            fmt = getattr(weight, "fmt", config.weight)
            fmt = fmt if decision.kind == "linear" else None
            activation = config.activation
            if activation in config.activation_candidates:
                activation = inputs.get(decision.name, activation)
            config = dataclasses.replace(
                config,
                weight=fmt,
                weight_candidates=(),
                pre_gelu_weight=None,
                activation=activation,
                activation_candidates=(),
            )
        resolved.append(dataclasses.replace(decision, config=config))
    return resolved


def _static_formats(graph: nn.Module) -> dict[str, str]:
    """Formats of linears' inputs with a static range, by the linear's name."""
    found = {}
    for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
        source = node.args[0] if node.target is torch.ops.aten.linear.default else None
        if isinstance(source, Node) and source.target is torch.ops.fp4dit_ao.fake_quantize.default:
            found[linear_name(node)] = str(source.args[3])
    return found


def _rules(decisions: Iterable[Decision]) -> dict[str, QuantConfig | None]:
    """One config a module; where a module is an attention and owns weights, its linear's config also says what q, k, v do."""
    rules: dict[str, QuantConfig | None] = {}
    for decision in sorted(decisions, key=lambda d: d.kind == "linear"):
        rules[decision.name] = decision.config or rules.get(decision.name)
    return rules


def build(
    model: nn.Module,
    description: Description,
    decisions: Iterable[Decision],
    dtype: torch.dtype,
    dtypes: Mapping[str, torch.dtype] | None = None,
    transforms: Sequence[GraphTransform] = (),
) -> GraphModule:
    """The lowered graph of ``model``, all of fake tensors.

    Args:
        model: the float model, on the meta device; its tensors are replaced.
        description: of the sample it is captured with (``samples.describe``).
        decisions: for every linear and attention, as :func:`resolve` left them.
        dtype: of the model, and of the sample's floating-point tensors.
        dtypes: of tensors that have another type, by name.
        transforms: graph transforms from their records, in the order in which they were applied.

    Raises:
        ValueError: the decisions or the sample are not those of this model.
    """
    quantizer = FP4DiTQuantizer()
    for name, config in _rules(decisions).items():
        quantizer.set_module_name(name, config)
    with _compat.fake_mode() as mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying fake tensors warns about data pointers that nobody reads
        prepared = _prepare(model, mode, description, dtype, quantizer, dtypes or {}, transforms)
        _pretend_calibrated(prepared)
        lowered: GraphModule = lower(convert_pt2e(prepared, fold_quantize=False))
    return lowered


def prepare(model: nn.Module, description: Description, dtype: torch.dtype, quantizer: FP4DiTQuantizer) -> GraphModule:
    """The prepared graph of ``model``, all of fake tensors; ``quantizer`` then has its decisions. See :func:`build`."""
    with _compat.fake_mode() as mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = _prepare(model, mode, description, dtype, quantizer, {})
    _compat.forget_graphs()
    return prepared


def _prepare(
    model: nn.Module,
    mode: _compat.FakeTensorMode,
    description: Description,
    dtype: torch.dtype,
    quantizer: FP4DiTQuantizer,
    dtypes: Mapping[str, torch.dtype],
    transforms: Sequence[GraphTransform] = (),
) -> GraphModule:
    _fake(model, mode, dtypes, dtype)
    specs = sample_description.specs(description).values()
    same = any(spec["dtype"] == str(dtype).removeprefix("torch.") for spec in specs)  # then others are meant to differ
    captured = capture(model, sample_description.empty_like(description, None if same else dtype))
    for transform in transforms:
        transform.apply(captured)
    prepared: GraphModule = prepare_pt2e(captured, quantizer)
    return prepared


def _fake(
    model: nn.Module, mode: _compat.FakeTensorMode, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype
) -> None:
    for prefix, module in model.named_modules():
        for slots in _compat.slots(module):
            for leaf, x in slots.items():
                if x is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                own = dtypes.get(name, dtype if x.is_floating_point() else x.dtype)
                fake = _compat.fake_like(x, mode, own)
                slots[leaf] = nn.Parameter(fake, requires_grad=False) if isinstance(x, nn.Parameter) else fake
        # tables of positions that are no buffers, such as Qwen-Image's, or lists of them; export records no fake ones
        for leaf, value in vars(module).items():
            if isinstance(value, Tensor | list | tuple):
                with _compat.without_modes():
                    vars(module)[leaf] = pytree.tree_map_only(Tensor, _empty_table, value)


def _empty_table(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype, device="cpu")


def _pretend_calibrated(prepared: GraphModule) -> None:
    """Give every observer codes and scales of the right shape, so that converting computes nothing from weights."""
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, WeightObserver):
            observer.pretend_observed(weight_of(prepared, node))
        elif isinstance(observer, StaticActivationObserver):
            observer.scale = lambda rank: torch.empty([1] * rank)  # type: ignore[method-assign]
