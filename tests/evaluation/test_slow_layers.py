"""Why a layer is not faster: one sentence from what is known of it."""

from dataclasses import replace

import pytest
import torch

from fp4dit_ao import MinifloatTensor, w4a6_codebook
from fp4dit_ao.evaluation import slow_layers
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.evaluation.slow_layers import FEW_TOKENS, reason
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.schemes import scheme_of

CPU = torch.device("cpu")
SLOW, FAST = LayerSpeed(2e-3, 1e-3, 0.5), LayerSpeed(1e-3, 2e-3, 2.0)


def packed(act: str | None = "e2m3") -> MinifloatTensor:
    return MinifloatTensor.from_hp(torch.randn(8, 64), [1, 32], "e2m1", act)


@pytest.fixture
def processor(monkeypatch):
    """Lets this processor have the best of some instruction sets, and the library or not."""

    def has(best: str | None) -> None:
        monkeypatch.setattr(slow_layers.codebook_linear, "kernels", lambda: {} if best is None else {best: 0})
        monkeypatch.setattr(native, "shared_object", lambda: None if best is None else object())
        monkeypatch.setattr(native, "instruction_set", lambda: best)

    return has


@pytest.mark.parametrize(
    ("best", "act", "rows", "speed", "expected"),
    [
        ("amx", None, 1000, SLOW, "no unit for these formats on this processor"),
        (None, "e2m3", 1000, SLOW, "no compiled kernel"),
        ("avx2", "e2m3", 1000, SLOW, "this processor has no dot products of bytes"),
        ("portable", "e2m3", 1000, SLOW, "this processor has no dot products of bytes"),
        ("amx", "e2m3", FEW_TOKENS, SLOW, f"few tokens ({FEW_TOKENS}): "),
        ("amx", "e2m3", 1000, LayerSpeed(6e-5, 3e-5, 0.5), "small layer: bfloat16 takes 30 µs"),
        ("amx", "e3m4", 1000, SLOW, "a level of e3m4 is 2 int8 digits"),
        ("amx", "e2m3", 1000, SLOW, "a float scale for each group costs a conversion"),
        ("amx", "e2m3", 1000, FAST, ""),
        ("avx2", "e3m4", 1, FAST, ""),
        ("amx", "e2m3", 1000, SLOW._replace(steady=False), "not known: other work disturbed the measuring"),
    ],
)
def test_the_first_cause_is_said(best, act, rows, speed, expected, processor) -> None:
    processor(best)
    found = reason(packed(act), CPU, rows, speed)
    assert found.startswith(expected) and bool(found) == bool(expected)


def test_without_any_of_them_bfloat16_is_as_good(processor) -> None:
    processor("amx")
    config = w4a6_codebook()
    weight = scheme_of(config).round_to_nearest("fc", torch.randn(8, 128), config)
    assert reason(weight, CPU, 1000, SLOW).startswith("bfloat16 has units of its own here")
    assert "codebook groups (w4a6_codebook) do not" in reason(packed(), CPU, 1000, SLOW)


def test_block_formats_are_emulated_and_that_is_the_reason() -> None:
    from fp4dit_ao.config import QuantConfig

    config = replace(QuantConfig.from_name("mxfp4"))
    weight = scheme_of(config).round_to_nearest("fc", torch.randn(32, 64), config)
    assert not weight.unit(CPU).low_bit
    assert reason(weight, CPU, 1000, SLOW).startswith("no unit for these formats on this processor")
