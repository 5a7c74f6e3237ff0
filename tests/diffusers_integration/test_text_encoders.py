"""Text encoders with low-bit weights: quantized beside a transformer, saved and loaded with the pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp4dit_ao import load_pipeline, quantize_pipeline
from fp4dit_ao.diffusers_integration.text_encoders import load_text_encoder, quantize_text_encoder
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from fp4dit_ao.tensors.minifloat import MinifloatTensor
from tests.tiny import CALL, tiny_pipeline

IDS = torch.tensor([[5, 6, 8, 1, 0, 0]])


def t5(gated: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=16, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4, pad_token_id=0,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )  # fmt: skip
    return T5EncoderModel(config).to(dtype).eval()


def clip() -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=16, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return CLIPTextModel(config).eval()


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def low_bit(model: nn.Module) -> list[str]:
    return [name for name, x in model.named_parameters() if isinstance(x.detach(), LowBitWeight)]


@pytest.mark.parametrize(
    ("make", "recipe"), [(lambda: t5(gated=True), None), (lambda: t5(dtype=torch.bfloat16), "w4a8"), (clip, "nvfp4")]
)
def test_what_is_saved_comes_back_with_the_same_bits(make: Any, recipe: str | None, tmp_path: Path) -> None:
    model = make()
    before = output(model)
    quantized = quantize_text_encoder(model, recipe)
    assert torch.equal(output(model), before) and not low_bit(model)  # the original stays as it was
    linears = [name for name, x in model.named_modules() if isinstance(x, nn.Linear)]
    assert low_bit(quantized) == [f"{name}.weight" for name in linears]
    error = (output(quantized) - before).norm() / before.norm()
    assert 0.001 < error < 0.5
    quantized.save_pretrained(tmp_path / "t")
    loaded = load_text_encoder(tmp_path / "t")
    assert type(loaded) is type(model) and low_bit(loaded) == low_bit(quantized)
    assert loaded.dtype == model.dtype and loaded.get_input_embeddings().weight.dtype == model.dtype
    assert torch.equal(output(loaded), output(quantized))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "t" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_weights_take_a_quarter_of_sixteen_bits() -> None:
    model = t5(dtype=torch.bfloat16)
    quantized = quantize_text_encoder(model, skip=["*.1.DenseReluDense.*"])
    weight = quantized.encoder.block[0].layer[0].SelfAttention.q.weight.detach()
    assert weight.act_fmt is None and weight.dtype == torch.bfloat16
    parts = [getattr(weight, name) for name in ("qdata", "index", "row_scale")]
    assert sum(part.nbytes for part in parts) < 0.3 * model.encoder.block[0].layer[0].SelfAttention.q.weight.nbytes
    assert not any("DenseReluDense" in name for name in low_bit(quantized))
    assert quantized.shared.weight is model.shared.weight  # what is not quantized is shared


def test_a_pipeline_with_its_text_encoder(tmp_path: Path) -> None:
    pipe: Any = tiny_pipeline(layers=1)
    how: dict[str, Any] = {"prompts": ["a red cat"], "rounding": "nearest", "progress": False, **CALL}
    quantized: Any = quantize_pipeline(
        pipe, "w4a6", components=["transformer", "text_encoder"], text_encoder_recipe="w4a8", skip=["*k"], **how
    )
    assert not low_bit(pipe.text_encoder)
    names = low_bit(quantized.text_encoder)
    assert any(name.endswith("q.weight") for name in names) and not any(name.endswith("k.weight") for name in names)
    weight = quantized.text_encoder.encoder.block[0].layer[0].SelfAttention.q.weight.detach()
    assert isinstance(weight, MinifloatTensor) and (weight.fmt, weight.act_fmt) == ("e2m1", "e3m4")

    def image(pipe: Any) -> torch.Tensor:
        return pipe("a red cat", output_type="pt", generator=torch.Generator().manual_seed(0), **CALL).images

    expected = image(quantized)
    quantized.save_pretrained(tmp_path / "q")
    for form in ("graph", "module"):
        loaded: Any = load_pipeline(tmp_path / "q", form=form)
        loaded.set_progress_bar_config(disable=True)
        assert low_bit(loaded.text_encoder) == low_bit(quantized.text_encoder)
        assert torch.equal(image(loaded), expected)
    assert load_pipeline(tmp_path / "q", dtype=torch.bfloat16).text_encoder.dtype == torch.bfloat16
    weights = tmp_path / "q" / "text_encoder" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        load_pipeline(tmp_path / "q")


def test_wrong_input_is_refused() -> None:
    pipe: Any = tiny_pipeline(layers=1)
    with pytest.raises(ValueError, match=r"names no transformer; give one, such as 'transformer'"):
        quantize_pipeline(pipe, components=["text_encoder"], prompts=["a"])
    with pytest.raises(ValueError, match="has no text_encoder_2"):
        quantize_pipeline(pipe, components=["transformer", "text_encoder_2"], prompts=["a"])
    with pytest.raises(ValueError, match="w4a6_static needs calibration data"):
        quantize_pipeline(
            pipe, components=["transformer", "text_encoder"], text_encoder_recipe="w4a6_static", prompts=["a"]
        )
    with pytest.raises(ValueError, match="nothing in this T5EncoderModel would be quantized"):
        quantize_text_encoder(pipe.text_encoder, skip=["*"])
    with pytest.raises(ValueError, match="of another quantization"):
        quantize_text_encoder(quantize_text_encoder(pipe.text_encoder))
