"""From low-bit tensor subclasses to plain tensors: what goes into files that are read without this package's classes."""

import copy

import torch
from torch.fx import GraphModule, Node

from fp4dit_ao import _compat, kernels
from fp4dit_ao.tensor import MinifloatTensor


def unwrap(model: GraphModule) -> GraphModule:
    """Rewrite ``linear(x, MinifloatTensor)`` to the arithmetic of ``kernels.linear`` on its codes and scales.

    These stand beside the weight as buffers, ``blocks.0.fc.weight_qdata`` and ``blocks.0.fc.weight_scale``. Values stay.

    Args:
        model: the result of ``lower``; not changed, and tensors are shared with it.
    """
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    model = copy.deepcopy(model, shared)
    for node in list(model.graph.nodes):
        if node.target is torch.ops.aten.linear.default:
            _unwrap_linear(model, node)
    model.graph.eliminate_dead_code()
    for path, x in list(model.named_parameters(remove_duplicate=False)):
        if isinstance(x, MinifloatTensor):
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
    if not isinstance(weight, MinifloatTensor):
        return
    with model.graph.inserting_before(node):
        qdata, scale = (
            _compat.create_buffer_node(model, f"{path}_{part}", getattr(weight, part))
            for part in weight.tensor_data_names
        )
        arguments = (x, qdata, scale, weight.block_size, weight.fmt, weight.act_fmt, rest[0] if rest else None)
        new = model.graph.call_function(kernels.linear, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    model.graph.erase_node(node)
