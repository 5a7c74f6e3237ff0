"""A prepared graph that runs block by block: with little memory for gradients, and with values inside of it at hand."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import checkpoint

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.passes.partition import Segment, cut_into_blocks, with_outputs


class BlockwiseModel:
    """The same computation as a prepared graph, in segments. It shares parameters and observers with the graph.

    Args:
        prepared: the graph; later changes to its parameters' *objects* are not seen.
        recompute: keep of each segment its inputs alone, and run it again when its gradient is due.
        taps: names of nodes inside the graph whose values :meth:`run` also gives.

    Attributes:
        segments: consecutive pieces of the graph.
        taps: as given, in the order of the graph.
    """

    def __init__(self, prepared: GraphModule, recompute: bool = False, taps: Collection[str] = ()):
        self.prepared, self.recompute = prepared, recompute
        self.segments = cut_into_blocks(prepared).segments()
        (result,) = next(node for node in prepared.graph.nodes if node.op == "output").args
        self._results = [leaf.name for leaf in pytree.tree_leaves(result) if isinstance(leaf, Node)]
        self.taps: list[str] = []
        self._graphs = [self._tapped(segment, taps) for segment in self.segments]

    def _tapped(self, segment: Segment, wanted: Collection[str]) -> tuple[GraphModule, list[str]]:
        """A segment's graph with the taps inside it as further outputs, and the names of all outputs."""
        found = [node for node in segment.graph.graph.nodes if node.op != "placeholder" and node.name in wanted]
        self.taps += [node.name for node in found]
        extra = [node for node in found if node.name not in segment.outputs]
        names = [*segment.outputs, *(node.name for node in extra)]
        return (with_outputs(segment, extra) if extra else segment.graph), names

    def run(self, call: Mapping[str, object]) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors among the outputs for one sample's keyword arguments, and the values of :attr:`taps`."""
        values = _compat.flat_inputs(self.prepared, call)
        tapped: dict[str, Tensor] = {}
        for segment, (graph, names) in zip(self.segments, self._graphs, strict=True):
            arguments = [values[name] for name in segment.inputs]
            if self.recompute and segment.block and torch.is_grad_enabled():
                outputs = checkpoint(graph, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                outputs = graph(*arguments)
            values.update(zip(names, outputs, strict=True))
            tapped |= {name: values[name] for name in self.taps if name in names}
            for name in segment.dead:
                if name not in self._results:
                    values.pop(name, None)
        return [values[x] for x in self._results if isinstance(values[x], Tensor)], [tapped[x] for x in self.taps]


def block_features(model: BlockwiseModel) -> list[str]:
    """Names of what blocks put out, tokens of several channels: the last such output of each block."""
    names = []
    for segment in model.segments:
        tokens = [name for name in segment.outputs if _rank(segment, name) > 2]
        if segment.block and tokens:
            names.append(tokens[-1])
    return names


def _rank(segment: Segment, name: str) -> int:
    value = next(node for node in segment.graph.graph.nodes if node.name == name).meta.get("val")
    return value.ndim if isinstance(value, Tensor) and value.is_floating_point() else 0
