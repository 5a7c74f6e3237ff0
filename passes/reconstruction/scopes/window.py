"""A sliding window over successive blocks (CBQ, arXiv 2312.07950)."""

from dataclasses import replace

from torch.fx import GraphModule

from fp4dit_ao.config import ReconstructionConfig
from fp4dit_ao.passes.partition import cut_into_blocks
from fp4dit_ao.passes.reconstruction.scopes.scope import Plan, Unit


def window(prepared: GraphModule, config: ReconstructionConfig) -> Plan:
    """A unit for every ``config.window`` successive blocks; the next one starts ``config.window - config.overlap`` later.

    So the rounding of a block is learned from what it does to the blocks behind it, too. The last window is shorter where the
    blocks do not divide evenly. What lies between two blocks counts as a block if it holds quantized linears.
    """
    cut = cut_into_blocks(prepared)
    steps = cut.segments()
    blocks = [i for i, segment in enumerate(steps) if segment.observers]
    units = []
    for start in range(0, max(1, len(blocks) - config.overlap), config.window - config.overlap):
        inside = blocks[start : start + config.window]
        if inside:
            names = dict.fromkeys(steps[i].name for i in (inside[0], inside[-1]))
            merged = replace(cut.merged(inside[0], inside[-1]), name=" … ".join(names))
            units.append(Unit(merged, inside[0], inside[-1]))
    return Plan(steps, units)
