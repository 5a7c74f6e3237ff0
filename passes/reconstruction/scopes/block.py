"""One transformer block at a time (BRECQ, arXiv 2102.05426): FP4DiT's scope."""

from torch.fx import GraphModule

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.passes.partition import partition
from fp4dit_ao.passes.reconstruction.scopes.scope import Plan, Unit


def block(prepared: GraphModule, config: ReconstructionConfig) -> Plan:
    """A unit for every block, and for what lies between two blocks if it holds quantized linears."""
    steps = partition(prepared)
    return Plan(steps, [Unit(segment, i, i) for i, segment in enumerate(steps) if segment.observers])
