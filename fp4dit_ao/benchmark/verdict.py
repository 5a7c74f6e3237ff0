"""One sentence from a benchmark: how much faster and smaller than in bfloat16 a quantized model is on this machine."""

import statistics
from collections.abc import Sequence

from fp4dit_ao.benchmark.bars import Results
from fp4dit_ao.benchmark.sections import BASE, CALL_SIZE
from fp4dit_ao.benchmark.turns import Measured


def verdict(results: Results) -> str:
    """The sentence, from whole generations if they were measured, else from steps, else from linears; empty without any."""
    recipe = results.settings["recipes"][0]
    for measured, of_what in (
        (results.generations, lambda case: f"{case['model']} quantized to {recipe} draws"),
        (
            results.steps,
            lambda case: f"a step of {case['layers']} PixArt-XL layers at {case['pixels']} px in {recipe} is",
        ),
    ):
        for own in reversed(results.of(measured)):
            ratio, base = own.ratio(BASE.label), _beside(measured, own)
            if ratio is not None and base is not None:
                return _sentence(of_what(own.case), ratio.median, base.facts["bytes"] / own.facts["bytes"])
    linears = [m for m in results.of(results.linears) if m.case != CALL_SIZE]
    speeds = [ratio.median for m in linears if (ratio := m.ratio("bfloat16"))]
    if not speeds:
        return ""
    smaller = 16 / statistics.median(m.facts["bits"] for m in linears)
    return _sentence(f"a linear in {recipe} is (median of {len(speeds)})", statistics.median(speeds), smaller)


def _beside(measured: Sequence[Measured], own: Measured) -> Measured | None:
    """bfloat16 in the case of ``own``."""
    same = (m for m in measured if m.case == own.case and m.variant == BASE and m.error is None)
    return next(same, None)


def _sentence(what: str, speed: float, smaller: float) -> str:
    end = "" if speed >= 1 else "; where speed counts, run bfloat16"
    return f"On this machine {what} {speed:.2f} times as fast as in bfloat16, with weights {smaller:.1f} times as small{end}."
