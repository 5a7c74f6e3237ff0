"""Scopes: which weights are rounded together. A file per method, and a line here that registers it.

To add one, write a function with the contract of :data:`Scope` in a new file, and register it below.
"""

from fp4dit_ao.passes.reconstruction.scopes.block import block
from fp4dit_ao.passes.reconstruction.scopes.layer import layer
from fp4dit_ao.passes.reconstruction.scopes.model import model
from fp4dit_ao.passes.reconstruction.scopes.scope import SCOPES, Plan, Scope, Unit
from fp4dit_ao.passes.reconstruction.scopes.window import window

SCOPES.register(
    "block", block, summary="Rounds the weights of a transformer block together, on the block's output.",
    source="BRECQ, arXiv 2102.05426", cost="1 forward of the model per stream, and the rounding rule's",
)  # fmt: skip
SCOPES.register(
    "layer", layer, summary="Rounds every linear alone, on its own output.",
    source="AdaRound, arXiv 2004.10568", cost="the rounding rule's, once per linear",
)  # fmt: skip
SCOPES.register(
    "window", window, summary="Rounds successive blocks together in overlapping windows, on the output of the last.",
    source="CBQ, arXiv 2312.07950",
    cost="window / (window - overlap) times that of scope block, and as much more memory for gradients",
)  # fmt: skip
SCOPES.register(
    "model", model, summary="Rounds all weights together, on the model's output.", source="DiscQuant, arXiv 2501.06417",
    cost="3 forwards and a backward of the model a step; roundings of all weights, and their optimizer's state, in memory",
)  # fmt: skip

__all__ = ["SCOPES", "Plan", "Scope", "Unit", "block", "layer", "model", "window"]
