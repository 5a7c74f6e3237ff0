"""The contract of a scope: which weights are rounded together, and on whose output."""

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import GraphModule

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.passes.partition import Segment
from fp4dit_ao.util.registry import Registry


@dataclass(frozen=True)
class Unit:
    """Weights that are rounded together.

    Attributes:
        segment: the piece of the graph that holds them, callable from its inputs (read from the quantized stream) to its
            outputs (compared with those of the full-precision stream).
        first, last: positions in :attr:`Plan.steps` of the first and the last step that it covers.
        recompute: whether gradients are found block by block, with the activations of one block in memory: one more forward of
            the unit a step.
    """

    segment: Segment
    first: int
    last: int
    recompute: bool = False


@dataclass(frozen=True)
class Plan:
    """What a scope makes of a graph.

    Attributes:
        steps: the whole graph, cut into consecutive segments. Streams of values advance by one step at a time.
        units: in the order in which they are rounded; ``first`` never decreases. Together they hold every weight observer. A
            weight that two units hold starts the second from what the first settled.
    """

    steps: list[Segment]
    units: list[Unit]


Scope = Callable[[GraphModule, ReconstructionConfig], Plan]
"""Called once by ``reconstruct``, before any data flows.

Given the prepared graph (with weight and activation observers) and the config, which holds the scope's own settings. It returns
a plan and leaves the graph as it is. Segments share modules and parameters with the graph (``partition.Cut`` makes them so).
"""

SCOPES: Registry[Scope] = Registry("scope")
"""Scopes by name."""
