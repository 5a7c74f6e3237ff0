"""The sentence at a benchmark's end: of the whole pipeline if that was measured, else of what comes closest."""

import pytest

from fp4dit_ao.benchmark.bars import Results
from fp4dit_ao.benchmark.turns import Measured
from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.benchmark.verdict import verdict

BASE = "bfloat16, compiled"


def results() -> Results:
    return Results({"recipes": ["w4a6_codebook"]}, {})


def model(case: dict, seconds: float) -> list[Measured]:
    """bfloat16 in two seconds with 700 bytes, ours with 200, and ours compiled by block, which is not what is asked for."""
    beside = {BASE: [2.0]}
    return [
        Measured(Variant("bfloat16", "compiled"), case, {"bytes": 700}, [2.0], beside),
        Measured(Variant("w4a6_codebook", "compiled"), case, {"bytes": 200}, [seconds], beside),
        Measured(Variant("w4a6_codebook", "by block"), case, {"bytes": 200}, [9.0], beside),
    ]


def linear(tokens: int, seconds: float) -> Measured:
    case = {"out_features": 64, "in_features": 64, "tokens": tokens}
    return Measured(Variant("w4a6_codebook", "compiled"), case, {"bits": 4.0}, [seconds], {"bfloat16": [3.0]})


def test_a_generation_comes_first() -> None:
    found = results()
    found.linears, found.steps = [linear(5, 1.0)], model({"pixels": 256, "layers": 28}, 1.0)
    found.generations = model({"model": "reference", "images": 4}, 1.25)
    assert verdict(found) == (
        "On this machine reference quantized to w4a6_codebook draws 1.60 times as fast as in bfloat16, with weights 3.5 times "
        "as small."
    )


@pytest.mark.parametrize(("seconds", "end"), [(2.0, "small."), (4.0, "small; where speed counts, run bfloat16.")])
def test_what_is_slower_says_so(seconds, end) -> None:
    found = results()
    found.steps = model({"pixels": 256, "layers": 28}, seconds)
    assert verdict(found).startswith("On this machine a step of 28 PixArt-XL layers at 256 px in w4a6_codebook is ")
    assert verdict(found).endswith(end)


def test_linears_alone_have_a_median() -> None:
    found = results()
    found.linears = [linear(5, 1.0), linear(6, 2.0), linear(7, 1.5)]
    assert verdict(found) == (
        "On this machine a linear in w4a6_codebook is (median of 3) 2.00 times as fast as in bfloat16, with weights 4.0 "
        "times as small."
    )


def test_without_results_nothing_is_said() -> None:
    found = results()
    assert verdict(found) == ""
    found.generations = [Measured(Variant("w4a6_codebook", "compiled"), {"model": "x"}, error="no memory")]
    assert verdict(found) == ""
