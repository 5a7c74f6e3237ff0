"""The certificate's sums and sentences, from made-up speeds."""

from dataclasses import replace

import pytest

from fp4dit_ao.evaluation.certificate import Certificate, MeasuredLinear
from fp4dit_ao.evaluation.layer_timing import LayerSpeed


def certificate(*speeds: float) -> Certificate:
    """Linears of a million elements in half a byte each that take 3 ms in bfloat16."""
    layers = [MeasuredLinear(f"fc{n}", LayerSpeed(3e-3 / s, 3e-3, s), 500_000, 1_000_000) for n, s in enumerate(speeds)]
    return Certificate(layers, "`fp4dit-ao generate DIR --weights auto`")


def test_forms_are_sums_over_layers() -> None:
    found = certificate(2.0, 0.5, 1.5)
    assert found.slow == {"fc1"}
    assert (found.bfloat16.seconds, found.bfloat16.bytes) == (pytest.approx(9e-3), 6e6)
    assert (found.held().seconds, found.held().bytes) == (pytest.approx(1.5e-3 + 6e-3 + 2e-3), 1.5e6)
    assert (found.picked.seconds, found.picked.bytes) == (pytest.approx(1.5e-3 + 3e-3 + 2e-3), 3e6)


def test_a_row_says_that_the_rule_picks_nothing_slower() -> None:
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in certificate(2.0, 0.5, 1.5).table().splitlines()
    ]
    assert rows[2:] == [
        ["bfloat16", "9", "1.00", "6.00"],
        ["packed", "9.5", "0.95", "1.50"],
        ["`--weights auto`: 1 of 3 in bfloat16, none slower than it", "6.5", "1.38", "3.00"],
    ]


def test_a_busy_machine_certifies_nothing() -> None:
    found = certificate(2.0, 0.5, 0.25)
    layers = [replace(layer, speed=layer.speed._replace(steady=layer.name != "fc1")) for layer in found.layers]
    busy = Certificate(layers, found.command)
    assert busy.slow == {"fc2"}
    assert "auto" not in busy.table() + busy.sentence()
    assert busy.sentence().startswith("Other work disturbed the measuring of 1 of 3 quantized linears")


@pytest.mark.parametrize(
    ("speeds", "said"),
    [
        ((2.0, 1.0), "Every quantized linear is at least as fast as bfloat16 here: together 1.33 times as fast, in 25% of the "
                     "bytes."),
        ((2.0, 0.5), "1 of 2 quantized linears are slower than bfloat16 here. With these in bfloat16, all together are 1.33 "
                     "times as fast, in 62% of the bytes: `fp4dit-ao generate DIR --weights auto`."),
        ((0.5, 0.75), "No linear of this model is faster than bfloat16 on this machine, so run it in bfloat16: `fp4dit-ao "
                      "generate DIR --weights auto`. Packed, the linears take 25% of the bytes, and 1.67 times as long."),
    ],
)  # fmt: skip
def test_the_sentence_says_what_to_do(speeds, said) -> None:
    assert certificate(*speeds).sentence() == said
