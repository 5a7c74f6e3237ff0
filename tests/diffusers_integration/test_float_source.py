"""Models that cannot be quantized, or not be loaded afterwards, are refused before any work is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp4dit_ao import FP4DiTConfig, quantize_modules, quantize_pipeline
from fp4dit_ao.diffusers_integration.float_source import check_source
from tests.diffusers_integration.test_lora import flux
from tests.diffusers_integration.test_pipeline import CALL
from tests.tiny import tiny_pipeline


def model() -> Any:
    return tiny_pipeline(layers=1).transformer


def add_lora(m: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(target_modules=["to_q"], init_lora_weights=False), m)


def widen(m: Any) -> None:
    m.transformer_blocks[0].attn1.to_q = nn.Linear(64, m.transformer_blocks[0].attn1.to_q.out_features)


def to_meta(m: Any) -> None:
    m.transformer_blocks[0].attn1.to_q.to("meta")


def to_fp8(m: Any) -> None:
    linear = m.transformer_blocks[0].attn1.to_q
    linear.weight.data = linear.weight.data.to(torch.float8_e4m3fn)


def to_ints(m: Any) -> None:
    linear = m.transformer_blocks[0].attn1.to_q
    linear.weight = nn.Parameter(linear.weight.data.to(torch.int8), requires_grad=False)


def to_low_bits(m: Any) -> None:
    from fp4dit_ao import MinifloatTensor

    linear = m.transformer_blocks[0].attn1.to_q
    linear.weight = nn.Parameter(MinifloatTensor.from_hp(linear.weight.data, [1, 32], "e2m1"), requires_grad=False)


REFUSED: list[tuple[Callable[[Any], None], str]] = [
    (add_lora, r"it carries a LoRA: call unload_lora.*to_q\.base_layer\.weight"),
    (lambda m: m.fuse_qkv_projections(), r"its projections are fused: call unfuse_qkv_projections.*to_qkv"),
    (lambda m: m.register_parameter("encoder_hid_proj", nn.Parameter(torch.ones(1))), "it carries an IP-Adapter"),
    (lambda m: m.register_buffer("mine", torch.ones(1)), "tensor mine is added"),
    (lambda m: m.transformer_blocks[0].attn1.to_q.register_parameter("bias", None), "to_q.bias is missing"),
    (widen, r"to_q.weight is \(\d+, 64\), not"),
    (to_meta, "to_q.weight is on the meta device: quantize the model before it is offloaded"),
    (to_fp8, "to_q.weight is torch.float8_e4m3fn; expected float32, .*: load the model without its quantization"),
    (to_ints, "to_q.weight is torch.int8; expected float32"),
    (to_low_bits, "to_q.weight is a MinifloatTensor, of another quantization"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_changed_models_are_refused_in_both_forms(change: Callable[[Any], None], message: str) -> None:
    pipe = tiny_pipeline(layers=1)
    change(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        quantize_modules(pipe.transformer)
    with pytest.raises(ValueError, match=message):
        quantize_pipeline(pipe, "w4a6", prompts=["a cat"], rounding="nearest", progress=False, **CALL)


def test_changes_that_are_undone_are_forgotten() -> None:
    from peft import LoraConfig

    m: Any = flux(None)
    m.add_adapter(LoraConfig(target_modules=["to_q"], init_lora_weights=False))
    m.fuse_lora()
    with pytest.raises(ValueError, match="it carries a LoRA"):
        check_source(m)
    m.unload_lora()
    m.fuse_qkv_projections()
    m.unfuse_qkv_projections()
    check_source(m)


def test_what_is_changed_after_quantizing_is_not_saved(tmp_path: Path) -> None:
    m = quantize_modules(model())
    with pytest.raises(ValueError, match="q, k and v of a quantized model stay apart"):
        m.fuse_qkv_projections()  # type: ignore[operator]
    with pytest.raises(ValueError, match="copy_ into a float tensor"):
        torch.empty(8, 8).copy_(m.transformer_blocks[0].attn1.to_q.weight)  # type: ignore[union-attr,index]
    m.transformer_blocks[0].mine = nn.Linear(2, 2)  # type: ignore[index]
    with pytest.raises(
        ValueError, match=r"was changed since it was quantized: .* has no place for tensor transformer_blocks\.0\.mine"
    ):
        m.save_pretrained(tmp_path / "changed")
    del m.transformer_blocks[0].mine  # type: ignore[index]
    m.save_pretrained(tmp_path / "whole")


# --- FP8 files -------------------------------------------------------------------------------------------------------


def test_fp8_weights_are_widened_while_they_are_loaded(tmp_path: Path) -> None:
    m = model()
    linears = [x for name, x in m.named_modules() if "blocks" in name and isinstance(x, nn.Linear)]
    for linear in linears:
        linear.weight.data = linear.weight.data.to(torch.float8_e4m3fn)
    m.save_pretrained(tmp_path / "fp8")
    load = type(m).from_pretrained
    loaded = load(tmp_path / "fp8", torch_dtype=torch.bfloat16, quantization_config=FP4DiTConfig("w4a6_e2m1"))
    expected = quantize_modules(load(tmp_path / "fp8", torch_dtype=torch.bfloat16), "w4a6_e2m1")
    ours, theirs = dict(loaded.named_parameters()), dict(expected.named_parameters())
    assert {name: p.dtype for name, p in ours.items()} == {name: p.dtype for name, p in theirs.items()}
    quantized = [name for name, p in ours.items() if hasattr(p, "qdata")]
    assert len(quantized) > 5
    assert all(torch.equal(ours[name].qdata, theirs[name].qdata) for name in quantized)


def test_fp8_weights_with_scales_beside_them_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    m = model()
    to_fp8(m)
    m.save_pretrained(tmp_path / "fp8")
    file = next((tmp_path / "fp8").glob("*.safetensors"))
    name = "transformer_blocks.0.attn1.to_q.weight_scale"
    save_file(load_file(file) | {name: torch.ones(1)}, file)
    with pytest.raises(ValueError, match=rf"has scales beside it \({name}\), which diffusers does not read"):
        type(m).from_pretrained(tmp_path / "fp8", torch_dtype=torch.bfloat16, quantization_config=FP4DiTConfig())


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_memory_footprint_is_that_of_what_is_stored(tmp_path: Path) -> None:
    pipe = tiny_pipeline(layers=1)
    whole, count = pipe.transformer.get_memory_footprint(), pipe.transformer.num_parameters()
    graph = quantize_pipeline(pipe, prompts=["a cat"], rounding="nearest", progress=False, **CALL).transformer
    modules: Any = quantize_modules(pipe.transformer)
    modules.save_pretrained(tmp_path / "saved")
    for form in (modules, graph):
        assert form.num_parameters() == count
        stored = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
        buffers = form.get_memory_footprint() - form.get_memory_footprint(return_buffers=False)
        assert stored * 0.9 < form.get_memory_footprint(return_buffers=False) < stored + 1
        assert 0 <= buffers < whole / 10
        assert form.get_memory_footprint() < whole / 2
    assert modules.dequantize().get_memory_footprint() == whole
