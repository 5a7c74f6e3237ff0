"""What exported graphs refuse, and the arithmetic of sizes."""

import random
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4dit_ao.deploy import size_expressions
from fp4dit_ao.deploy.signature import Signature, as_length, signature_of
from fp4dit_ao.graph_capture import sample_description


def tensor(shape: list[Any], dtype: str = "float32") -> dict[str, Any]:
    return {"tensor": {"shape": shape, "dtype": dtype, "device": "cpu"}}


SIGNATURE = Signature(
    inputs={
        "dict": {
            "maps": {"list": [tensor(["n", 3]), {"dict": {"of": tensor(["n"], "bool")}}]},
            "mask": tensor(["m", "k"]),
            "video": tensor(["n", "d"]),
            "skip": {"constant": 1},
            "return_dict": {"constant": False},
        }
    },
    numbers={"frames": "f", "rate": 8},
    relations=["((2*m) // n) == 2", "((2*m) % n) == 0", "d == f*max(1, k)"],
)


def call(n: int = 4, m: int = 4, k: int = 2, d: int = 10, frames: Any = 5, rate: Any = 8) -> dict[str, Any]:
    maps = [torch.ones(n, 3), {"of": torch.ones(n, dtype=torch.bool)}]
    return {"maps": maps, "mask": torch.ones(m, k), "video": torch.ones(n, d), "frames": frames, "rate": rate}


@pytest.mark.parametrize("sizes", [{}, {"n": 1, "m": 1}, {"k": 1, "d": 5}, {"frames": 0, "d": 0}])
def test_what_fits_is_accepted(sizes: dict[str, int]) -> None:
    arguments = call(**sizes)
    bound = SIGNATURE.bind(arguments, "it")
    assert list(sample_description.specs(SIGNATURE.inputs)) == ["maps[0]", "maps[1].of", "mask", "video"]
    assert bound["skip"] == 1 and bound["return_dict"] is False
    assert bound["frames"].shape == (arguments["frames"], 0)
    assert bound["maps"][1]["of"] is arguments["maps"][1]["of"]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"m": 1}, "mask (1, 2) and maps[0] (4, 3) do not fit: ((2*mask.shape[0]) // maps[0].shape[0]) == 2 must hold"),
        ({"m": 5}, "((2*mask.shape[0]) % maps[0].shape[0]) == 0 must hold"),
        ({"frames": 4}, "do not fit: video.shape[1] == frames*max(1, mask.shape[1]) must hold"),
        ({"frames": 4}, "video (4, 10) and frames 4 and mask (4, 2) do not fit"),
        ({"frames": None}, "frames must be a whole number, found None"),
        ({"frames": True}, "frames must be a whole number, found True"),
        ({"frames": -1}, "frames must be a whole number, found -1"),
        ({"rate": 9}, "rate is 9, it was captured as 8, which is fixed"),
        ({"n": 0}, "do not fit"),
    ],
)
def test_what_does_not_is_refused_by_name(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^it: .*" + re.escape(message)):
        SIGNATURE.bind(call(**sizes), "it")


def test_equal_sizes_must_be_equal_wherever_they_are() -> None:
    arguments = call()
    arguments["maps"][1]["of"] = torch.ones(5, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"it: maps\[1\]\.of\.shape\[0\] is 5, it must be 4, as maps\[0\]\.shape\[0\] is"
    ):
        SIGNATURE.bind(arguments, "it")


def test_a_relation_that_nobody_can_check_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flat(torch.nn.Module):
        def forward(self, *, x: torch.Tensor, length: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (x.flatten() + y).sum() + length.shape[0]

    example = {"x": torch.ones(3, 4), "length": as_length(5), "y": torch.ones(12)}
    shapes = {name: dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for name, x in example.items()}
    exported = torch.export.export(Flat(), (), example, dynamic_shapes=shapes)
    s = [str(size) for size in next(n for n in exported.graph.nodes if n.name == "x").meta["val"].shape]
    found = [f"{s[0]} == {s[0]}", "u0 == 1", f"{s[0]} == TruncToInt({s[1]} / 2)"]
    monkeypatch.setattr("fp4dit_ao._compat.size_relations", lambda exported: found)
    signature = signature_of(exported, ["length"])
    (y,) = signature.inputs["dict"]["y"]["tensor"]["shape"]
    assert signature.relations[0] == found[0] and len(signature.relations) == 2
    assert size_expressions.evaluate(signature.relations[1], {y: 21, s[0]: 7, s[1]: 3})
    arguments = {"x": torch.ones(7, 3), "y": torch.ones(21), "length": 2}
    assert float(exported.module(check_guards=False)(**signature.bind(arguments, "it"))) == 44
    with pytest.raises(ValueError, match=r"do not fit: y\.shape\[0\] == x\.shape.*x\.shape.* must hold"):
        signature.bind(arguments | {"y": torch.ones(20)}, "it")


# --- arithmetic ------------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["s0", "s1", "s27"])
EXPRESSIONS = st.recursive(
    st.integers(0, 999).map(str) | NAMES,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["+", "-", "*", "//", "%"]), inner).map("({0[0]} {0[1]} {0[2]})".format)
        | inner.map("-{}".format)
        | st.tuples(st.sampled_from(["min", "max"]), inner, inner).map("{0[0]}({0[1]}, {0[2]})".format)
    ),
    max_leaves=12,
)


@given(EXPRESSIONS, EXPRESSIONS, st.integers(0, 2**32))
def test_expressions_have_pythons_values(left: str, right: str, seed: int) -> None:
    draw = random.Random(seed)
    values = {name: draw.randrange(1, 100) for name in ("s0", "s1", "s27")}
    for expression in (left, f"{left} == {right}"):
        try:
            expected = eval(expression, {"__builtins__": {}, "min": min, "max": max}, values)
        except ZeroDivisionError:
            with pytest.raises(ZeroDivisionError):
                size_expressions.evaluate(expression, values)
        else:
            assert size_expressions.evaluate(expression, values) == expected


@pytest.mark.parametrize(
    "expression",
    ["s9", "s0.real", "__import__('os')", "s0(1)", "(lambda: 1)()", "[1]", "s0 ==", "1.5", "'a'", "s0 < 1", "1 == 1 == 1",
     "2 ** 9", "True", "max(*[1])", "min(s0, key=s0)", "min()", "(" * 500 + "1" + ")" * 500, "-" * 100_000 + "1"],
)  # fmt: skip
def test_nothing_else_is_evaluated(expression: str) -> None:
    with pytest.raises(ValueError, match="cannot evaluate"):
        size_expressions.evaluate(expression, {"s0": 1})
    assert expression == "s9" or not size_expressions.readable(expression)


def test_readable() -> None:
    assert size_expressions.readable("s9 % (s8 - s9) == max(1, s7)")


def test_names() -> None:
    assert size_expressions.names("(6*s78) // max(s41, s7) == s78") == ["s78", "s41", "s7"]
    assert (
        size_expressions.rename("s7*s78 == min(s7, 1)", {"s7": "x.shape[0]"}) == "x.shape[0]*s78 == min(x.shape[0], 1)"
    )
