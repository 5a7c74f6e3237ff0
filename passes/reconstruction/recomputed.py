"""A unit of many blocks with the memory of one block's gradients."""

from collections.abc import Callable

from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fp4dit_ao.passes.partition import cut_into_blocks
from fp4dit_ao.passes.reconstruction.shared_compilation import Runs


class Recomputed:
    """A unit's graph that keeps of each block its inputs alone, and runs it again when its gradient is due.

    Args:
        graph: of the unit; parameters and observers are shared.
        run: what runs the graph of a block, or between blocks: as it is, or compiled.
    """

    def __init__(self, graph: GraphModule, run: Callable[[GraphModule], Runs]):
        self._segments = cut_into_blocks(graph).segments()
        self._runs = [run(segment.graph) for segment in self._segments]
        self._inputs = [node.name for node in graph.graph.nodes if node.op == "placeholder"]
        (results,) = next(node for node in graph.graph.nodes if node.op == "output").args
        self._results = [node.name for node in results]

    def __call__(self, *arguments: Tensor) -> list[Tensor]:
        """Results of the graph."""
        values: dict[str, Tensor] = dict(zip(self._inputs, arguments, strict=True))
        for segment, run in zip(self._segments, self._runs, strict=True):
            inputs = [values[name] for name in segment.inputs]
            # random numbers are drawn again as they were: what an objective drops is the same in both runs
            outputs = checkpoint(run, *inputs, use_reentrant=False) if segment.block else run(*inputs)
            values.update(zip(segment.outputs, outputs, strict=True))
            for name in segment.dead:
                if name not in self._results:
                    values.pop(name, None)
        return [values[name] for name in self._results]
