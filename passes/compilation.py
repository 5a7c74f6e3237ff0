"""A lowered graph under ``torch.compile``: whole, or one block for all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.passes.block_outlining import kinds_of_blocks, outline


def compile_graph(graph: GraphModule) -> Callable[..., Any]:
    """``graph`` compiled as one: the fastest, after the longest wait.

    Once for every batch of two or more, image size and text length; a batch of one is compiled once more on first use.
    """
    return _Compiled(graph)


def compile_blocks(graph: GraphModule) -> GraphModule:
    """``graph`` with each kind of block compiled once, and all blocks of the kind running that code.

    What lies between blocks stays uncompiled. The wait does not grow with the number of blocks;
    ``fp4dit-ao benchmark --part transformer`` prints what it is, and what it costs in speed.

    Args:
        graph: the result of ``lower``; not changed, and its tensors are shared.
    """
    outlined = outline(graph)
    for weight in (*outlined.parameters(), *outlined.buffers()):
        _compat.mark_static(weight)  # an argument of its block, but no size of it changes
    for name, body in kinds_of_blocks(outlined).items():
        setattr(outlined, name, _Compiled(body))
    return outlined


class _Compiled(nn.Module):
    def __init__(self, body: GraphModule):
        super().__init__()
        self.run = torch.compile(body, dynamic=True, fullgraph=True)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map(_plain, (args, kwargs))
        with _compat.distinct_sizes():
            return self.run(*args, **kwargs)


def _plain(x: Any) -> Any:
    """A contiguous tensor that is no view: what it is a view of, and its strides, would be compiled in.

    (Pipelines expand one timestep over the batch; uncompiled linears return views.)
    """
    if not isinstance(x, Tensor) or isinstance(x, nn.Parameter):
        return x
    x = x.contiguous()
    return x.data if _compat.is_view_of_another(x) and not x.requires_grad else x
