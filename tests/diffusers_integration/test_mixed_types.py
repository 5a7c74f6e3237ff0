"""Models that keep some tensors in float32 whatever type they are loaded in, quantized, saved, loaded and cast."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp4dit_ao import FP4DiTConfig, QuantizedTransformer, example_inputs, quantize_modules
from fp4dit_ao.families.dtypes import is_kept, main_dtype

BFLOAT16 = torch.bfloat16


def types(model: nn.Module) -> dict[str, torch.dtype]:
    return {name.partition(".part")[0]: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}


def wan() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=64, in_channels=4, out_channels=4, text_dim=64,
        freq_dim=64, ffn_dim=256, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def test_wan_keeps_its_types_in_both_forms(tmp_path: Path) -> None:
    wan().save_pretrained(tmp_path / "float")
    load = type(wan()).from_pretrained
    model = load(tmp_path / "float", torch_dtype=BFLOAT16)
    kept = {name: dtype for name, dtype in types(model).items() if dtype == torch.float32}
    assert "scale_shift_table" in kept
    assert len(kept) < len(types(model))
    inputs = example_inputs(model)
    assert inputs["hidden_states"].dtype == BFLOAT16
    original = types(model)
    quantize_modules(model, "w4a6").save_pretrained(tmp_path / "quantized")
    assert types(model) == original
    with torch.no_grad():
        expected = model(**inputs).sample
    for again in (
        load(tmp_path / "quantized", torch_dtype=BFLOAT16),
        QuantizedTransformer.from_pretrained(tmp_path / "quantized"),
    ):
        found = types(again.graph if isinstance(again, QuantizedTransformer) else again)
        assert found == original
        assert again.dtype == BFLOAT16 or not isinstance(again, QuantizedTransformer)
        with torch.no_grad():
            assert torch.equal(again(**inputs).sample, expected)
    narrowed = again.to(torch.float16)
    assert {name for name, dtype in types(narrowed.graph).items() if dtype == torch.float32} == set(kept)
    at_once = load(tmp_path / "float", torch_dtype=BFLOAT16, quantization_config=FP4DiTConfig("w4a6"))
    assert types(at_once) == original


def test_the_type_of_most_elements_is_the_models() -> None:
    few, many = ("table", torch.ones(2)), ("linear.weight", torch.ones(4, dtype=BFLOAT16))
    assert main_dtype([few, many]) == BFLOAT16
    assert main_dtype([few, ("codes", torch.ones(9, dtype=torch.uint8))]) == torch.float32
    kept = ("norm1.weight", torch.ones(9))
    assert main_dtype([kept, many]) == torch.float32
    assert main_dtype([kept, many], ["norm1"]) == BFLOAT16
    assert main_dtype([kept], ["norm1"]) == torch.float32
    assert main_dtype([]) == torch.float32


@pytest.mark.parametrize(("name", "expected"), [("blocks.0.norm1.weight", True), ("blocks.0.norm12.weight", False)])
def test_names_are_compared_part_by_part(name: str, expected: bool) -> None:
    assert is_kept(name, ["norm1"]) is expected
