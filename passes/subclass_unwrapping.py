"""From low-bit tensor subclasses to plain tensors: what goes into files that are read without this package's classes."""

import torch
from torch.fx import GraphModule, Node
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.passes.weight_unpacking import refuse_unpacked
from fp4dit_ao.schemes import owner_of


def unwrap(model: GraphModule) -> GraphModule:
    """Rewrite the linear of every low-bit weight to a function of plain tensors: its scheme's ``plain_linear``.

    ``linear(x, MinifloatTensor)`` becomes the arithmetic of ``kernels.linear`` on its codes and scales. These stand beside the
    weight as buffers, ``blocks.0.fc.weight_qdata`` and ``blocks.0.fc.weight_scale``. Values stay. Block
    formats become the arithmetic of ``kernels.block_scaled_linear``, on Blackwell, too, and E8M0 scales their bytes.

    Args:
        model: the result of ``lower``; not changed, and tensors are shared with it.

    Raises:
        ValueError: its weights were unpacked.
    """
    refuse_unpacked(model, "exporting")
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    model = _compat.copied(model, shared)
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
    scheme = owner_of(weight.detach())
    if scheme is None:
        raise ValueError(
            f"{path} is a {type(weight.detach()).__name__}, which cannot be exported; quantize the model with a recipe of "
            "this package"
        )
    plain = scheme.plain_linear(weight.detach())
    with model.graph.inserting_before(node):
        buffers = [_compat.create_buffer_node(model, f"{path}_{part}", value) for part, value in plain.tensors.items()]
        arguments = (x, *buffers, *plain.arguments, rest[0] if rest else None)
        new = model.graph.call_function(plain.function, arguments)
    new.meta.update(node.meta)
    node.replace_all_uses_with(new)
    model.graph.erase_node(node)
