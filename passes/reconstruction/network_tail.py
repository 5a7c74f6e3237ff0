"""The full-precision rest of the network behind a unit: what the unit's error does to the model's output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from fp4dit_ao.observers import set_fake_quantize
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.passes.reconstruction.streams import Stream, Values


class NetworkTail:
    """The steps behind one unit, in full precision.

    What the unit does not put out (conditioning, long skip connections) is the original's. Under autograd each step is computed
    again in the backward pass, so that a minibatch holds the activations of one step alone.

    Args:
        steps: of the plan, behind the unit; their observers are paused.
        results: names of the model's outputs.
    """

    def __init__(self, steps: Sequence[Segment], results: Sequence[str]):
        self.steps, self.results = list(steps), list(results)
        made = {name for step in steps for name in step.outputs}
        read = (name for step in steps for name in step.inputs)
        self._inputs = [name for name in dict.fromkeys((*read, *results)) if name not in made]
        for step in steps:
            set_fake_quantize(step.graph, False, False, paused=True)

    def outputs(self, stream: Stream, rows: Tensor | slice, unit: Mapping[str, object]) -> list[Any]:
        """The model's outputs for some rows.

        Args:
            stream: its full-precision values stand behind the unit.
            rows: of the stream.
            unit: what the unit puts out for these rows, by name; where empty, the original's values.
        """
        names = [name for name in self._inputs if name not in unit]
        values = dict(unit) | dict(zip(names, stream.select(stream.full, names, rows), strict=True))
        for step in self.steps:
            found = _run(step.graph, [values[name] for name in step.inputs])
            values.update(zip(step.outputs, found, strict=True))
        return [values[name] for name in self.results]

    def originals(self, stream: Stream, chunk: int) -> Values:
        """The original's outputs for all rows of a stream, by name, ``chunk`` rows at a time."""
        return stream.collected(self.results, lambda rows: self.outputs(stream, rows, {}), chunk)


def model_results(model: GraphModule) -> list[str]:
    """Names of the values that a graph returns."""
    return [node.name for node in next(n for n in model.graph.nodes if n.op == "output").all_input_nodes]


def _run(graph: Callable[..., Sequence[object]], arguments: Sequence[object]) -> Sequence[object]:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return checkpoint(graph, *arguments, use_reentrant=False, preserve_rng_state=False)
    return graph(*arguments)
