"""Compiles a lowered graph with ``torch.compile``, as a whole or one block of each kind."""

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.passes.block_outlining import kinds_of_blocks, outline
from fp4dit_ao.passes.graph_stage import require_graph
from fp4dit_ao.passes.joined_linears import join_linears


def compile_graph(graph: GraphModule, *, joined: bool = True) -> nn.Module:
    """Compiles ``graph`` as a whole: the fastest to run, and the slowest to compile.

    The code serves all batches of two or more, image sizes and text lengths; a batch of one compiles again on first
    use.

    Args:
        graph: the result of ``lower``; it shares its tensors with the result.
        joined: whether linears that read the same value become one product; see :func:`join_linears`.
    """
    return _Compiled(join_linears(graph) if joined else graph)


def compile_blocks(graph: GraphModule, *, joined: bool = True) -> GraphModule:
    """Compiles each kind of block once; all blocks of the kind run that code, and nodes between blocks run uncompiled.

    The compile time does not grow with the number of blocks; ``fp4dit-ao benchmark --part transformer`` prints it, and
    the loss of speed.

    Args:
        graph: the result of ``lower``; it is not changed, and shares its tensors with the result.
        joined: whether linears that read the same value become one product; see :func:`join_linears`.
    """
    require_graph(graph, "compile_blocks", "the result of lower")
    outlined = outline(join_linears(graph) if joined else graph)
    for weight in (*outlined.parameters(), *outlined.buffers()):
        _compat.mark_static(weight)  # weights are arguments of their block here, but their sizes never change
    for name, body in kinds_of_blocks(outlined).items():
        setattr(outlined, name, _Compiled(body))
    return outlined


class _Compiled(nn.Module):
    def __init__(self, body: GraphModule):
        super().__init__()
        self.run = torch.compile(body, dynamic=True, fullgraph=True, options=_compat.compiler_options())

    def forward(self, *args: object, **kwargs: object) -> object:
        args, kwargs = pytree.tree_map(_plain, (args, kwargs))
        with _compat.distinct_sizes():
            return self.run(*args, **kwargs)


def _plain(x: object) -> object:
    """Contiguous tensor that is not a view: the base and the strides of a view would become part of the compiled code.

    Pipelines expand one timestep over the batch, and uncompiled linears return views.
    """
    if not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
        return x
    x = x.contiguous()
    return x.data if _compat.is_view_of_another(x) and not x.requires_grad else x
