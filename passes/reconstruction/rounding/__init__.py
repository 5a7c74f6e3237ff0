"""Rounding rules: which of the format's values every weight takes. A file per method, and a line here that registers it.

To add one, write a class with the contract of :class:`LearnedRounding` or :class:`ClosedFormRounding` in a new file, and
register it
below: a learned rule as the class, a closed form as an instance.
"""

from fp4dit_ao.passes.reconstruction.rounding.adaround import AdaRound, ScaleAwareAdaRound
from fp4dit_ao.passes.reconstruction.rounding.cbq import LowRankAdaRound
from fp4dit_ao.passes.reconstruction.rounding.discquant import DiscQuant
from fp4dit_ao.passes.reconstruction.rounding.flexround import LRQ, FlexRound
from fp4dit_ao.passes.reconstruction.rounding.gptq import GPTQ
from fp4dit_ao.passes.reconstruction.rounding.lowbit_fp import LowBitFP
from fp4dit_ao.passes.reconstruction.rounding.nearest import Nearest
from fp4dit_ao.passes.reconstruction.rounding.rule import ROUNDINGS, ClosedFormRounding, LearnedRounding, RoundingRule
from fp4dit_ao.passes.reconstruction.rounding.sign_gradient import SignGradient

ROUNDINGS.register("nearest", Nearest(), summary="Rounds every weight to the nearest value.", cost="none; no data")
ROUNDINGS.register(
    "scale_aware", ScaleAwareAdaRound, summary="AdaRound in weight units: learns which neighbour each weight takes.",
    source="FP4DiT, arXiv 2503.15465, Theorem 2", cost="iters optimisation steps per unit",
)  # fmt: skip
ROUNDINGS.register(
    "adaround", AdaRound, summary="AdaRound in logits: learns which neighbour each weight takes.",
    source="AdaRound, arXiv 2004.10568", cost="iters optimisation steps per unit",
)  # fmt: skip
ROUNDINGS.register(
    "gptq", GPTQ(), summary="Rounds column by column; later columns make good the errors of earlier ones.",
    source="GPTQ, arXiv 2210.17323", cost="a Hessian per linear (half a forward per group of linears), then seconds",
)  # fmt: skip
ROUNDINGS.register(
    "gptq_act_order", GPTQ(act_order=True), summary="GPTQ with the columns of the largest inputs first.",
    source="GPTQ, arXiv 2210.17323; the order: its reference code", cost="as gptq",
)  # fmt: skip
ROUNDINGS.register(
    "sign_gradient", SignGradient, summary="AutoRound: learns offsets before rounding, and scales, by the signs of gradients.",
    source="SignRound, arXiv 2309.05516", cost="iters optimisation steps per unit; 200 do",
)  # fmt: skip
ROUNDINGS.register(
    "flexround", FlexRound, summary="Learns what every weight is divided by before it is rounded to nearest, and scales.",
    source="FlexRound, arXiv 2306.00317", cost="iters optimisation steps per unit",
)  # fmt: skip
ROUNDINGS.register(
    "lrq", LRQ, summary="FlexRound with divisors of low rank.",
    source="LRQ, arXiv 2407.11534", cost="as flexround, with half the parameters",
)  # fmt: skip
ROUNDINGS.register(
    "lowbit_fp", LowBitFP, summary="AdaRound with a plain sigmoid and a constant exponent.",
    source="LowBit-FP, arXiv 2408.06995", cost="as adaround",
)  # fmt: skip
ROUNDINGS.register(
    "discquant", DiscQuant, summary="Draws weights to their nearer neighbours, except where the output objects.",
    source="DiscQuant, arXiv 2501.06417", cost="as adaround",
)  # fmt: skip
ROUNDINGS.register(
    "cbq", LowRankAdaRound, summary="AdaRound with logits that change by a matrix of rank 5.",
    source="CBQ, arXiv 2312.07950", cost="as adaround, with a fraction of the parameters",
)  # fmt: skip

__all__ = [
    "GPTQ",
    "LRQ",
    "ROUNDINGS",
    "AdaRound",
    "ClosedFormRounding",
    "DiscQuant",
    "FlexRound",
    "LearnedRounding",
    "LowBitFP",
    "LowRankAdaRound",
    "Nearest",
    "RoundingRule",
    "ScaleAwareAdaRound",
    "SignGradient",
]
