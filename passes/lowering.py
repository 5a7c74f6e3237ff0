"""From the converted graph's reference semantics to low-bit tensor subclasses that ``torch.compile`` runs fast."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from fp4dit_ao import _compat
from fp4dit_ao._compat import Operator
from fp4dit_ao.kernels.attention import arguments_of
from fp4dit_ao.passes.device_placement import leave_inference_mode
from fp4dit_ao.passes.graph_stage import is_observed, is_quantized, require_graph
from fp4dit_ao.schemes import SCHEMES
from fp4dit_ao.schemes.graph_patterns import is_call, token_wise_input
from fp4dit_ao.tensors.low_bit_weight import store_parts
from fp4dit_ao.util.plain_mode import plain_mode

_OPS = torch.ops.fp4dit_ao
_ANNOTATION = "quantization_annotation"


@plain_mode()
def lower(model: GraphModule) -> GraphModule:
    """Rewrite ``linear(dequantize(quantize(x)), dequantize(codes))`` to ``linear(x, MinifloatTensor)``.

    Which tensor takes the weight's place, and which inputs it quantizes itself, is the quantization scheme's to say.

    The parameter takes the float weight's place and name (``blocks.0.fc.weight``), so the state dict has the original's
    keys. Token-wise input quantization moves into the tensor's ``linear``, that of q, k and v into ``fp4dit_ao.attention``;
    what else is quantized (a static range) becomes ``fake_quantize``, which Inductor fuses. Each linear and each attention
    computes what the converted graph does, up to float32 rounding (bfloat16, in an attention of a bfloat16 model).

    Graphs that were prepared or converted before, and that nobody holds, are freed: torchao's caches would keep them.

    Args:
        model: the result of ``convert_pt2e``; not changed.

    Raises:
        ValueError: no graph, one that still has observers, or one of which nothing is quantized.
    """
    require_graph(model, "lower", "the result of convert_pt2e")
    if is_observed(model):
        raise ValueError("lower: this graph has observers and is not converted yet; give it convert_pt2e(prepared)")
    if not is_quantized(model):
        raise ValueError(
            "lower: nothing in this graph is quantized; give it the result of prepare_pt2e and convert_pt2e"
        )
    _compat.forget_graphs()
    shared = {id(x): x for x in model.buffers()}  # codes and scales are read, not changed
    return lower_in_place(leave_inference_mode(_compat.copied(model, shared)))


def lower_in_place(model: GraphModule) -> GraphModule:
    """:func:`lower`, of a graph that nobody else needs."""
    for node in model.graph.nodes:
        node.meta.pop(_ANNOTATION, None)  # holds nodes of the graph that was prepared, and so all of that graph
    for node in list(model.graph.nodes):
        if node.target is torch.ops.aten.linear.default:
            lower_linear(model, node)
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            _lower_attention(model, node)
        if node.target is torch.ops.aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            _replace(model, node, _OPS.tanh_gelu.default, (node.args[0],))
    model.graph.eliminate_dead_code()
    for node in list(model.graph.nodes):
        if node.target is _OPS.dequantize.default and is_call(node.args[0], _OPS.quantize.default):
            _drop_codes(model, node)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    _delete_unused_buffers(model)
    model.graph.lint()
    model.recompile()
    return model


def _drop_codes(model: GraphModule, node: Node) -> None:
    """``dequantize(quantize(x))`` to ``fake_quantize(x)``: a float operator after it has no use for codes."""
    codes, block_size, scale, fmt, output_dtype = node.args
    assert isinstance(codes, Node)
    _replace(model, node, _OPS.fake_quantize.default, (codes.args[0], block_size, scale, fmt, output_dtype))


def _replace(model: GraphModule, node: Node, target: Operator, arguments: tuple[Argument, ...]) -> None:
    """``node`` by a call of ``target``."""
    with model.graph.inserting_before(node):
        new = model.graph.call_function(target, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    model.graph.erase_node(node)


def lower_linear(
    model: GraphModule,
    node: Node,
    device: torch.device | None = None,
    keep: Callable[[Tensor], Tensor] = lambda part: part,
) -> None:
    """Replaces a linear by its low-bit form, if its weight is stored in one of the schemes.

    Args:
        model: a converted graph.
        node: an ``aten.linear`` in it.
        device: where the low-bit weight goes; it stays where it is if None.
        keep: copies the weight's parts to where they are kept.
    """
    dequantized = node.args[1]
    found = next((found for scheme in SCHEMES.values() if (found := scheme.lowered(model, node)) is not None), None)
    if found is None:
        return
    assert isinstance(dequantized, Node)
    parent, _, leaf = found.path.rpartition(".")
    owner = model.get_submodule(parent)
    while hasattr(owner, leaf):  # a shared weight whose uses differ in activation format
        leaf += "_"
    weight = found.weight if device is None else found.weight.to(device)
    store_parts(weight, keep)
    owner.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    with model.graph.inserting_before(node):
        parameter = model.graph.get_attr(f"{parent}.{leaf}" if parent else leaf)
    parameter.meta["val"] = dequantized.meta.get("val")
    node.update_arg(0, found.x)
    node.update_arg(1, parameter)


def _lower_attention(model: GraphModule, node: Node) -> None:
    """``scaled_dot_product_attention`` of quantized q, k and v, unless it asks for what ours lacks (dropout, causal, GQA)."""
    found = arguments_of(node.args, node.kwargs)
    if found is None:
        return
    *tensors, mask, scale = found
    inputs = [value for x in tensors if (value := token_wise_input(x)) is not None]
    formats = {x.fmt for x in inputs}
    if len(inputs) < len(tensors) or len(formats) > 1:
        return
    _replace(model, node, _OPS.attention.default, (*(x.source for x in inputs), mask, scale, formats.pop()))


def _delete_unused_buffers(model: GraphModule) -> None:
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    for path, _ in list(model.named_buffers()):
        if path not in used:
            parent, _, leaf = path.rpartition(".")
            delattr(model.get_submodule(parent), leaf)
