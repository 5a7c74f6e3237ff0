"""From the converted graph's reference semantics to low-bit tensor subclasses that ``torch.compile`` runs fast."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fp4dit_ao.kernels.attention import arguments_of
from fp4dit_ao.passes.block_scaled_patterns import block_input, block_weight, stored_scales
from fp4dit_ao.tensors.minifloat import MinifloatTensor

_OPS = torch.ops.fp4dit_ao


def lower(model: GraphModule) -> GraphModule:
    """Rewrite ``linear(dequantize(quantize(x)), dequantize(codes))`` to ``linear(x, MinifloatTensor)``.

    Where both operands are in a block format of the hardware, to torchao's ``MXTensor`` or ``NVFP4Tensor``.

    The parameter takes the float weight's place and name (``blocks.0.fc.weight``), so the state dict has the original's
    keys. Token-wise input quantization moves into the tensor's ``linear``, that of q, k and v into ``fp4dit_ao.attention``;
    what else is quantized (a static range) becomes ``fake_quantize``, which Inductor fuses. Each linear and each attention
    computes what the converted graph does, up to float32 rounding (bfloat16, in an attention of a bfloat16 model).

    Args:
        model: the result of ``convert_pt2e``; not changed.
    """
    model = copy.deepcopy(model)
    for node in list(model.graph.nodes):
        if node.target is torch.ops.aten.linear.default and _is_stored_weight(node.args[1]):
            _lower_linear(model, node)
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            _lower_attention(model, node)
        if node.target is torch.ops.aten.gelu.default and node.kwargs.get("approximate") == "tanh":
            _replace(model, node, _OPS.tanh_gelu.default, (node.args[0],))
    model.graph.eliminate_dead_code()
    for node in list(model.graph.nodes):
        if node.target is _OPS.dequantize.default and _is_call(node.args[0], _OPS.quantize.default):
            _drop_codes(model, node)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    _delete_unused_buffers(model)
    model.graph.lint()
    model.recompile()
    return model


def _is_stored_weight(node: Any) -> bool:
    """Whether a node dequantizes codes and scales that are buffers."""
    if not isinstance(node, Node) or node.target is not _OPS.dequantize.default:
        return False
    codes = node.args[0]
    return isinstance(codes, Node) and codes.op == "get_attr" and bool(stored_scales(node.args[2]))


def _is_call(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target


def _drop_codes(model: GraphModule, node: Node) -> None:
    """``dequantize(quantize(x))`` to ``fake_quantize(x)``: a float operator after it has no use for codes."""
    codes, block_size, scale, fmt, output_dtype = node.args
    assert isinstance(codes, Node)
    _replace(model, node, _OPS.fake_quantize.default, (codes.args[0], block_size, scale, fmt, output_dtype))


def _replace(model: GraphModule, node: Node, target: Any, arguments: tuple[Any, ...]) -> None:
    """``node`` by a call of ``target``."""
    with model.graph.inserting_before(node):
        new = model.graph.call_function(target, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    model.graph.erase_node(node)


def _lower_linear(model: GraphModule, node: Node) -> None:
    dequantized = node.args[1]
    assert isinstance(dequantized, Node)
    codes_node, block_size, scale_node, fmt, dtype = dequantized.args
    assert isinstance(codes_node, Node)
    codes = _get(model, str(codes_node.target))
    scales = [_get(model, str(scale.target)) for scale in stored_scales(scale_node)]
    x: Any
    if (found := block_input(node.args[0])) is not None:
        x, weight = found[0], block_weight(codes, scales, str(fmt), dtype)  # type: ignore[arg-type]
    else:
        x, act_fmt = _token_wise_input(node.args[0])
        (scale,) = scales
        weight = MinifloatTensor.from_codes(codes, scale, list(block_size), str(fmt), act_fmt, dtype)  # type: ignore[arg-type]
    path = str(codes_node.target).removesuffix("_codes")
    parent, _, leaf = path.rpartition(".")
    owner = model.get_submodule(parent)
    while hasattr(owner, leaf):  # a shared weight whose uses differ in activation format
        leaf += "_"
    owner.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    with model.graph.inserting_before(node):
        parameter = model.graph.get_attr(f"{parent}.{leaf}" if parent else leaf)
    parameter.meta["val"] = dequantized.meta.get("val")
    node.update_arg(0, x)
    node.update_arg(1, parameter)


def _lower_attention(model: GraphModule, node: Node) -> None:
    """``scaled_dot_product_attention`` of quantized q, k and v, unless it asks for what ours lacks (dropout, causal, GQA)."""
    found = arguments_of(node.args, node.kwargs)
    if found is None:
        return
    *tensors, mask, scale = found
    inputs = [_token_wise_input(x) for x in tensors]
    formats = {fmt for _, fmt in inputs}
    if None in formats or len(formats) > 1:
        return
    _replace(model, node, _OPS.attention.default, (*(x for x, _ in inputs), mask, scale, formats.pop()))


def _token_wise_input(node: Any) -> tuple[Any, str | None]:
    """(x, format) if ``node`` is the token-wise quantized and dequantized ``x``, else (node, None)."""
    if not isinstance(node, Node) or node.target is not _OPS.dequantize.default:
        return node, None
    codes, _, scale, fmt, _ = node.args
    if not (isinstance(codes, Node) and codes.target is _OPS.quantize.default):
        return node, None
    if not (isinstance(scale, Node) and scale.target is _OPS.choose_scale.default):
        return node, None
    x, block_size = scale.args[0], list(scale.args[1])  # type: ignore[arg-type]
    token_wise = block_size[-1] == -1 and all(size == 1 for size in block_size[:-1])
    return (x, str(fmt)) if token_wise and codes.args[0] is x else (node, None)


def _get(model: nn.Module, path: str) -> Tensor:
    parent, _, leaf = path.rpartition(".")
    value = getattr(model.get_submodule(parent), leaf)
    assert isinstance(value, Tensor)
    return value


def _delete_unused_buffers(model: GraphModule) -> None:
    used = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    for path, _ in list(model.named_buffers()):
        if path not in used:
            parent, _, leaf = path.rpartition(".")
            delattr(model.get_submodule(parent), leaf)
