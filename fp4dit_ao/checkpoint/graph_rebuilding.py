"""A quantized graph without its weights: built anew from a model's config, so that nothing needs to be unpickled.

Capture, annotate, convert and lower run on fake tensors (shapes and types, no memory), by the same code that made the graph
in the first place; then stored codes, scales and float tensors take the fake ones' places. The cost is one ``torch.export``.
"""

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.checkpoint.quantization_record import Record, model_config
from fp4dit_ao.checkpoint.tensor_files import first_line
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import capture
from fp4dit_ao.observers import StaticActivationObserver, WeightObserver
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.ops import full_block
from fp4dit_ao.passes.lowering import lower
from fp4dit_ao.passes.transforms.split_inputs import part_sizes
from fp4dit_ao.quantizer import Decision, FP4DiTQuantizer


def empty_model(
    config: Mapping[str, Any], limit: int | None = None, buffers: bool = False, cls: Any = None
) -> nn.Module:
    """The float model that ``config`` describes, on the meta device.

    Args:
        config: a diffusers config.
        limit: on the number of its parameters.
        buffers: whether buffers get the values that the model makes for them.
        cls: of the model; diffusers' own of the name in ``config`` if None.

    Raises:
        ValueError: diffusers has no such model class, it does not take this config, or makes too large a model of it.
    """
    import diffusers

    name = config.get("_class_name")
    if cls is None:
        cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(f"diffusers {diffusers.__version__} has no model class {name!r}; install a version that does")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with _on_meta(buffers), _at_most(limit):
            model: nn.Module = cls.from_config(plain).eval()  # type: ignore[attr-defined]
            return model
    except Exception as error:
        raise ValueError(f"{name} cannot be made from its config: {first_line(error)}") from error


def _on_meta(but_buffers: bool) -> contextlib.AbstractContextManager[Any]:
    if not but_buffers:
        return torch.device("meta")
    from accelerate import init_empty_weights

    context: contextlib.AbstractContextManager[Any] = init_empty_weights(include_buffers=False)
    return context


@contextlib.contextmanager
def _at_most(limit: int | None) -> Iterator[None]:
    """Raise ``ValueError`` once modules have registered more than ``limit`` parameters."""
    count = 0

    def hook(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if limit is not None and count > limit:
            raise ValueError(f"it has more than the {limit} parameters that go with what is stored")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def resolve(decisions: Iterable[Decision], graph: nn.Module) -> list[Decision]:
    """The decisions with configs that no longer depend on data or on the graph around a layer.

    Args:
        decisions: of the quantizer that annotated the graph.
        graph: the lowered graph; a weight format that was searched for is read off its tensors.
    """
    weights = dict(graph.named_parameters())
    resolved = []
    for decision in decisions:
        config = decision.config
        if config is not None:
            weight = weights.get(f"{decision.name}.weight")
            fmt = getattr(weight, "fmt", config.weight)
            fmt = fmt if decision.kind == "linear" else None
            config = dataclasses.replace(config, weight=fmt, weight_candidates=(), pre_gelu_weight=None)
        resolved.append(dataclasses.replace(decision, config=config))
    return resolved


def _rules(decisions: Iterable[Decision]) -> dict[str, QuantConfig | None]:
    """One config a module; where a module is an attention and owns weights, its linear's config also says what q, k, v do."""
    rules: dict[str, QuantConfig | None] = {}
    for decision in sorted(decisions, key=lambda d: d.kind == "linear"):
        rules[decision.name] = decision.config or rules.get(decision.name)
    return rules


def build(
    model: nn.Module,
    description: Any,
    decisions: Iterable[Decision],
    dtype: torch.dtype,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> GraphModule:
    """The lowered graph of ``model``, all of fake tensors.

    Args:
        model: the float model, on the meta device; its tensors are replaced.
        description: of the sample it is captured with (``samples.describe``).
        decisions: for every linear and attention, as :func:`resolve` left them.
        dtype: of the model, and of the sample's floating-point tensors.
        dtypes: of tensors that have another type, by name.

    Raises:
        ValueError: the decisions or the sample are not those of this model.
    """
    quantizer = FP4DiTQuantizer()
    for name, config in _rules(decisions).items():
        quantizer.set_module_name(name, config)
    with _compat.fake_mode() as mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # copying fake tensors warns about data pointers that nobody reads
        prepared = _prepare(model, mode, description, dtype, quantizer, dtypes or {})
        _pretend_calibrated(prepared)
        lowered: GraphModule = lower(convert_pt2e(prepared, fold_quantize=False))
    return lowered


def prepare(model: nn.Module, description: Any, dtype: torch.dtype, quantizer: FP4DiTQuantizer) -> GraphModule:
    """The prepared graph of ``model``, all of fake tensors; ``quantizer`` then has its decisions. See :func:`build`."""
    with _compat.fake_mode() as mode, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _prepare(model, mode, description, dtype, quantizer, {})


def _prepare(
    model: nn.Module,
    mode: Any,
    description: Any,
    dtype: torch.dtype,
    quantizer: FP4DiTQuantizer,
    dtypes: Mapping[str, torch.dtype],
) -> GraphModule:
    _fake(model, mode, dtypes, dtype)
    prepared: GraphModule = prepare_pt2e(capture(model, sample_description.empty_like(description, dtype)), quantizer)
    return prepared


def _fake(model: nn.Module, mode: Any, dtypes: Mapping[str, torch.dtype], dtype: torch.dtype) -> None:
    for prefix, module in model.named_modules():
        for slots in (module._parameters, module._buffers):
            for leaf, x in slots.items():
                if x is None:
                    continue
                name = f"{prefix}.{leaf}" if prefix else leaf
                own = dtypes.get(name, dtype if x.is_floating_point() else x.dtype)
                fake = _compat.fake_like(x, mode, own)
                slots[leaf] = nn.Parameter(fake, requires_grad=False) if isinstance(x, nn.Parameter) else fake


def _pretend_calibrated(prepared: GraphModule) -> None:
    """Give every observer codes and scales of the right shape, so that converting computes nothing from weights."""
    for node in prepared.graph.nodes:
        observer = prepared.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(observer, WeightObserver):
            weight = weight_of(prepared, node)
            blocks = [
                n // b for n, b in zip(weight.shape, full_block(weight.shape, observer.block_size(weight)), strict=True)
            ]
            observer.scale = torch.empty(blocks, dtype=observer.scale_dtype)
            observer.codes = torch.empty(weight.shape, dtype=torch.uint8)
        elif isinstance(observer, StaticActivationObserver):
            observer.scale = lambda rank: torch.empty([1] * rank)  # type: ignore[method-assign]


# --- tensors ---------------------------------------------------------------------------------------------------------


def state_of(graph: GraphModule) -> dict[str, Tensor]:
    """Every tensor that the graph reads, by name: parameters, buffers and constants."""
    names = dict.fromkeys(str(node.target) for node in graph.graph.nodes if node.op == "get_attr")
    return {name: value for name in names if isinstance(value := tensor_at(graph, name), Tensor)}


def record_of(model: Any) -> Record:
    """How a ``QuantizedTransformer`` was quantized."""
    parts = part_sizes(model.graph.named_parameters())
    own = model_config(model.config)
    return Record(model.decisions, model.dtype, model.recipe, model.source, model.description, parts, model=own)


def tensors_to_save(model: Any) -> dict[str, Tensor]:
    """Every tensor of a ``QuantizedTransformer``, codes and scales apart."""
    return {part: y for name, x in state_of(model.graph).items() for part, y in flatten(name, x.detach()).items()}


def flatten(name: str, x: Tensor) -> dict[str, Tensor]:
    """The plain tensors that ``x`` is made of: itself, or ``name.qdata``, ``name.scale`` and so on."""
    if not isinstance(x, TorchAOBaseTensor):
        return {name: x}
    parts = {part: getattr(x, part) for part in _compat.parts(type(x))}
    return {f"{name}.{part}": value for part, value in parts.items() if isinstance(value, Tensor)}


def fill(graph: GraphModule, stored: Mapping[str, Tensor]) -> None:
    """Put stored tensors in the places of the fake ones.

    Args:
        graph: from :func:`build`; changed.
        stored: plain tensors, as :func:`flatten` named them.

    Raises:
        ValueError: a tensor is missing, left over, or has another shape or type than the graph's.
    """
    places = state_of(graph)
    expected = {part: y for name, x in places.items() for part, y in flatten(name, x).items()}
    missing, unknown = sorted(set(expected) - set(stored)), sorted(set(stored) - set(expected))
    if missing or unknown:
        wrong = f"lacks {missing[0]}" if missing else f"holds {unknown[0]}, which the model does not have"
        raise ValueError(f"it {wrong} ({len(missing)} missing and {len(unknown)} unknown tensors)")
    for part, y in expected.items():
        found = stored[part]
        if found.shape != y.shape or found.dtype != y.dtype:
            raise ValueError(
                f"{part} is {tuple(found.shape)} of {found.dtype}, where the model has {tuple(y.shape)} of {y.dtype}"
            )
    for name, x in places.items():
        value = stored.get(name)
        if isinstance(x, TorchAOBaseTensor):
            value = type(x)(*(stored.get(f"{name}.{part}", getattr(x, part)) for part in _compat.parts(type(x))))
        assert value is not None
        put_tensor(graph, name, value)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer of a model, by name."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def tensor_at(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    parent, _, leaf = path.rpartition(".")
    return getattr(root.get_submodule(parent), leaf)


def put_tensor(root: nn.Module, path: str, value: Tensor) -> None:
    """Put ``value`` in the place of the parameter or buffer at a dotted path."""
    parent, _, leaf = path.rpartition(".")
    owner = root.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        owner._buffers[leaf] = value
