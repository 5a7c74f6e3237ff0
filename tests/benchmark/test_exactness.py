"""The comparison of lowered and converted graphs: on equal inputs they agree step by step, and a wrong step is seen."""

from typing import Any

import pytest
import torch
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks import exactness
from fp4dit_ao import FP4DiTQuantizer, capture, collect_samples, lower, w4a6
from tests.graphs import TinyDiT, tiny_sample
from tests.tiny import CALL, tiny_pipeline

STEP = 2e-6
"""Rounding of sums of up to 512 float32 products, relative to the result: 16 times 2**-23."""


@pytest.fixture(scope="module")
def graphs() -> Any:
    sample = tiny_sample(batch=3, tokens=17)
    prepared = prepare_pt2e(capture(TinyDiT(layers=2), sample), FP4DiTQuantizer().set_global(w4a6()))
    with torch.no_grad():
        prepared(**sample)
    converted = convert_pt2e(prepared)
    return converted, lower(converted), [*sample.values(), False]


def test_on_equal_inputs_every_step_agrees(graphs: Any) -> None:
    assert 0 < exactness.step_by_step(*graphs) < STEP


def test_a_wrong_step_is_seen(graphs: Any) -> None:
    converted, lowered, inputs = graphs
    bias = lowered.get_parameter("blocks.1.ff.down.bias").detach()
    before = bias.clone()
    bias.add_(0.01)
    wrong = exactness.step_by_step(converted, lowered, inputs)
    bias.copy_(before)
    assert wrong > 1e-3


def test_a_row_of_the_table() -> None:
    pipe = tiny_pipeline(layers=1)
    samples = collect_samples(pipe, ["a red cat"], samples=2, progress=False, **CALL)
    row = exactness.measure("w4a6", pipe.transformer, samples)
    assert 0 < row["step"] < STEP
    assert row["model"] < 0.2 and row["nudged"] < 0.2
