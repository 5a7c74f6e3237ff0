"""From low-bit tensor subclasses to plain tensors: what goes into files that are read without this package's classes."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat, kernels
from fp4dit_ao.kernels import block_scaled_linear
from fp4dit_ao.tensors.block_scaled import MXWeight, NVFP4Weight
from fp4dit_ao.tensors.levels import refuse_unpacked
from fp4dit_ao.tensors.minifloat import MinifloatTensor


def unwrap(model: GraphModule) -> GraphModule:
    """Rewrite ``linear(x, MinifloatTensor)`` to the arithmetic of ``kernels.linear`` on its codes and scales.

    These stand beside the weight as buffers, ``blocks.0.fc.weight_qdata`` and ``blocks.0.fc.weight_scale``. Values stay. Block
    formats become the arithmetic of ``kernels.block_scaled_linear``, on Blackwell, too, and E8M0 scales their bytes.

    Args:
        model: the result of ``lower``; not changed, and tensors are shared with it.

    Raises:
        ValueError: its weights were unpacked.
    """
    refuse_unpacked(model.parameters(), "exporting")
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for node in list(model.graph.nodes):
        if node.target is torch.ops.aten.linear.default:
            _unwrap_linear(model, node)
    model.graph.eliminate_dead_code()
    for path, x in list(model.named_parameters(remove_duplicate=False)):
        if isinstance(x.detach(), TorchAOBaseTensor):
            parent, _, leaf = path.rpartition(".")
            delattr(model.get_submodule(parent), leaf)
    model.graph.lint()
    model.recompile()
    return model


def _unwrap_linear(model: GraphModule, node: Node) -> None:
    x, parameter, *rest = node.args
    assert isinstance(parameter, Node)
    path = str(parameter.target)
    parent, _, leaf = path.rpartition(".")
    weight = getattr(model.get_submodule(parent), leaf, None) if parameter.op == "get_attr" else None
    if not isinstance(weight, TorchAOBaseTensor):
        return
    function, parts, attributes = _plain(weight.detach())
    with model.graph.inserting_before(node):
        buffers = [_compat.create_buffer_node(model, f"{path}_{part}", value) for part, value in parts.items()]
        new = model.graph.call_function(function, (x, *buffers, *attributes, rest[0] if rest else None))
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    model.graph.erase_node(node)


def _plain(weight: Tensor) -> tuple[Callable[..., Tensor], dict[str, Tensor], tuple[Any, ...]]:
    """What computes a weight's ``linear`` of plain tensors: a function, these tensors, and the arguments after them."""
    if isinstance(weight, MinifloatTensor):
        parts = {"qdata": weight.qdata, "scale": weight.scale}
        return kernels.linear, parts, (weight.block_size, weight.fmt, weight.act_fmt)
    if isinstance(weight, MXWeight):
        parts = {"qdata": weight.qdata, "scale": weight.scale.view(torch.uint8)}
        return block_scaled_linear.mx_linear, parts, (weight.fmt,)
    if isinstance(weight, NVFP4Weight):
        parts = {"qdata": weight.qdata, "scale": weight.scale, "per_tensor_scale": weight.per_tensor_scale}
        return block_scaled_linear.nvfp4_linear, parts, ()
    raise ValueError(f"a {type(weight).__name__} cannot be exported; quantize the model with a recipe of this package")
