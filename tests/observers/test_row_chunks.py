"""A weight that is rounded some rows at a time gets the codes that it gets as a whole."""

import pytest
import torch
from torchao.quantization.granularity import PerAxis, PerGroup, PerTensor

from fp4dit_ao.observers import BlockWeightObserver, CodebookWeightObserver, WeightObserver, row_chunks

OBSERVERS = {
    "absmax": lambda: WeightObserver("e2m1"),
    "searched": lambda: WeightObserver("e2m1", search="mse"),
    "channel": lambda: WeightObserver("e2m1", PerAxis(0)),
    "tensor": lambda: WeightObserver("e2m1", PerTensor(), search="mse"),
    "eight bits": lambda: WeightObserver("e3m4", PerGroup(64), search="lowbit_fp"),
    "codebook": lambda: CodebookWeightObserver("nf4_groups"),
    "MX": lambda: BlockWeightObserver("e2m1", "e8m0"),
    "NVFP4": lambda: BlockWeightObserver("e2m1", "e4m3"),
}


@pytest.mark.parametrize("kind", OBSERVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_bit(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = OBSERVERS[kind]().quantized(weight)
    monkeypatch.setattr(row_chunks, "_AT_ONCE", {"cpu": 5 * 256})  # seven chunks of five rows, and one of two
    assert row_chunks.rows_at_once(weight) == 5
    found = OBSERVERS[kind]().quantized(weight)
    assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_a_row_is_the_least() -> None:
    assert row_chunks.rows_at_once(torch.empty(2, 2**26, device="meta")) == 1
    assert row_chunks.rows_at_once(torch.empty(2, 0)) > 1
