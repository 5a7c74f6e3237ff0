"""All weights at once, on the model's output (DiscQuant, arXiv 2501.06417)."""

from dataclasses import replace

from torch.fx import GraphModule

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.passes.partition import WHOLE, cut_into_blocks
from fp4dit_ao.passes.reconstruction.scopes.scope import Plan, Unit


def model(prepared: GraphModule, config: ReconstructionConfig) -> Plan:
    """One unit from the first quantized block to the model's outputs.

    The paper's divergence of next-token distributions is for a diffusion transformer the squared error of its prediction.
    Blocks are computed again for their gradients, as in its code.
    """
    cut = cut_into_blocks(prepared)
    steps = cut.segments()
    first = next((i for i, segment in enumerate(steps) if segment.observers), None)
    if first is None:
        return Plan(steps, [])
    last = len(steps) - 1
    return Plan(steps, [Unit(replace(cut.merged(first, last), name=WHOLE), first, last, recompute=True)])
