"""LoRAs on low-bit weights: loaded, swapped, unloaded; fused, which rounds anew, and unfused, which brings every bit back."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fp4dit_ao import quantize_modules, unpack_weights
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.diffusers_integration.module_form import finish
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant
from fp4dit_ao.passes.transforms.split_inputs import part_name
from tests.diffusers_integration.test_module_form import low_bit, run
from tests.tiny import tiny_pipeline

FUSED = [f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_v")]


def flux(recipe: str | None = "w4a6") -> nn.Module:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=64, joint_attention_dim=64,
        pooled_projection_dim=64, in_channels=16, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return quantize_modules(model.eval(), recipe) if recipe else model.eval()


def adapter(model: nn.Module, seed: int, rank: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name in FUSED:
        path = f"transformer.{name}"
        linear = model.get_submodule(path.removeprefix("transformer."))
        state[f"{path}.lora_A.weight"] = torch.randn(rank, linear.in_features, generator=generator)
        state[f"{path}.lora_B.weight"] = torch.randn(linear.out_features, rank, generator=generator) * 0.1
    return state


def test_loras_load_swap_and_unload() -> None:
    model: Any = flux()
    plain = run(model)
    model.load_lora_adapter(adapter(model, 1), adapter_name="one")
    with_one = run(model)
    model.load_lora_adapter(adapter(model, 2), adapter_name="two")
    model.set_adapters("two")
    with_two = run(model)
    assert not torch.equal(with_one, plain)
    assert not torch.equal(with_two, with_one)
    model.set_adapters("one")
    assert torch.equal(run(model), with_one)
    model.disable_lora()
    assert torch.equal(run(model), plain)
    model.enable_lora()
    with pytest.raises(ValueError, match="the transformer carries a LoRA"):
        model.save_pretrained("nowhere")
    model.unload_lora()
    assert torch.equal(run(model), plain)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_lora_adds_its_product_to_a_quantized_linear() -> None:
    model: Any = flux()
    linear = model.transformer_blocks[0].attn.to_q
    x = torch.randn(3, linear.in_features)
    plain = linear(x)
    state = adapter(model, 1)
    model.load_lora_adapter(state, adapter_name="one")
    path = "transformer.transformer_blocks.0.attn.to_q"
    product = x @ state[f"{path}.lora_A.weight"].T @ state[f"{path}.lora_B.weight"].T
    torch.testing.assert_close(model.transformer_blocks[0].attn.to_q(x), plain + product)


def test_peft_wraps_the_linears_of_pixart() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = quantize_modules(tiny_pipeline(layers=3).transformer)
    plain = run(model)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False), model)
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == 12
    assert not torch.equal(run(model), plain)


# --- fused -----------------------------------------------------------------------------------------------------------


def codes(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    from fp4dit_ao.checkpoint.graph_tensors import flatten

    found = {}
    for name, p in model.named_parameters():
        if hasattr(p, "qdata"):
            parts = flatten("", p.detach()).values()
            found[name.replace(".base_layer", "")] = [x.view(torch.uint8) if x.ndim else x for x in parts]
    return found


def same(ours: dict[str, list[torch.Tensor]], theirs: dict[str, list[torch.Tensor]]) -> set[str]:
    """Names of the weights that differ."""
    assert ours.keys() == theirs.keys()
    return {k for k, parts in ours.items() if not all(map(torch.equal, parts, theirs[k]))}


@pytest.mark.parametrize("recipe", ["w4a6", "w4a6_codebook", "nvfp4", "mxfp6_e2m3"])
def test_fusing_rounds_the_sum_and_unfusing_restores_every_bit(recipe: str) -> None:
    model: Any = flux(recipe)
    before, plain = codes(model), run(model)
    weights = {name: model.get_submodule(name).weight.dequantize() for name in FUSED}
    state = adapter(model, 1)
    model.load_lora_adapter(state, adapter_name="one")
    unfused = run(model)
    model.fuse_lora(lora_scale=0.5)
    assert same(codes(model), before) == {f"{name}.weight" for name in FUSED}
    for name, weight in weights.items():
        path = f"transformer.{name}"
        product = 0.5 * state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
        expected = quantized_alone(weight + product, recipe)
        assert torch.equal(model.get_submodule(name).base_layer.weight.dequantize(), expected)
    model.unfuse_lora()
    assert same(codes(model), before) == set()
    model.fuse_lora()  # lora_scale of the first call stays, as diffusers has it: 0.5
    model.unfuse_lora()
    model.unload_lora()
    assert same(codes(model), before) == set()
    assert torch.equal(run(model), plain)
    assert not torch.equal(unfused, plain)


def quantized_alone(weight: torch.Tensor, recipe: str) -> torch.Tensor:
    """What ``quantize_modules`` makes of a model whose weights are this one."""
    from fp4dit_ao import QuantConfig
    from fp4dit_ao.schemes import scheme_of

    config = QuantConfig.from_name(recipe)
    return scheme_of(config).round_to_nearest("alone", weight, config).dequantize()


def test_a_fused_lora_does_what_it_did_unfused_but_for_rounding() -> None:
    """A fused weight errs as much as a float weight that is quantized, and no more."""
    model: Any = flux()
    float_model = flux(recipe=None)
    plain = run(model)
    weights = {name: model.get_submodule(name).weight.dequantize() for name in FUSED}
    model.load_lora_adapter(adapter(model, 1), adapter_name="one")
    unfused = run(model)
    model.fuse_lora()
    effect = (unfused - plain).norm()
    assert effect > 0.02 * plain.norm()
    assert 0 < (run(model) - unfused).norm() < 0.4 * effect
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        first = relative_error(weight, float_model.get_submodule(name).weight)
        again = relative_error(layer.base_layer.weight.dequantize(), weight + layer.get_delta_weight("one"))
        assert 0.05 < again < 1.1 * first


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((x - exact).norm() / exact.norm()).detach())


def dora(targets: list[str]) -> dict[str, torch.Tensor]:
    """A DoRA of the float model, under whose magnitudes rows change their lengths, too."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model: Any = flux(None)
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=True))
    state = {f"transformer.{name}": x for name, x in get_peft_model_state_dict(model).items()}
    return {name: x * (1 + 0.3 * torch.rand_like(x)) if "magnitude" in name else x for name, x in state.items()}


@pytest.mark.parametrize("recipe", ["w4a6", "w4a6_codebook", "mxfp4", "nvfp4"])
def test_a_dora_divides_by_the_norms_of_the_dequantized_weights(recipe: str) -> None:
    """DoRA (arXiv 2402.09353), equation 5, in float64; the input of the first product is quantized as without it."""
    model: Any = flux(recipe)
    plain = run(model)
    model.load_lora_adapter(dora(["to_q", "to_out.0", "proj_mlp"]), adapter_name="one")
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_magnitude_vector")]
    assert len(layers) == 4
    for layer in layers:
        down, up = (x["one"].weight.double() for x in (layer.lora_A, layer.lora_B))
        base = layer.get_base_layer()
        total = base.weight.dequantize(torch.float32).double() + up @ down
        factor = layer.lora_magnitude_vector["one"].weight.double() / total.norm(dim=1)
        x = torch.randn(3, base.in_features)
        with torch.no_grad():
            exact = factor * ((base(x) - base.bias).double() + x.double() @ down.T @ up.T) + base.bias.double()
            assert relative_error(layer(x).double(), exact) < 1e-5
    assert not torch.equal(run(model), plain)
    with pytest.raises(ValueError, match="DoraLinearVariant, which cannot be fused"):
        model.fuse_lora()
    model.unload_lora()
    assert torch.equal(run(model), plain)


def test_a_dora_of_a_linear_one_of_whose_parts_is_smoothed_is_refused() -> None:
    model: Any = flux()
    whole = "single_transformer_blocks.0.proj_out"
    smoothing = SmoothQuant.from_record({"groups": [{"linears": [part_name(whole, 0)], "folded": []}]})
    smoothing.apply_to_modules(model)
    model.hf_quantizer.record.transforms.append(smoothing)
    model = finish(model, model.hf_quantizer)
    with pytest.raises(ValueError, match=f"it changes {whole}, whose stored weight is what a transform made of it"):
        model.load_lora_adapter(dora(["proj_out"]), adapter_name="one")


def test_a_dora_of_a_linear_that_a_transform_changed_is_refused() -> None:
    model: Any = flux()
    smoothing = SmoothQuant.from_record({"groups": [{"linears": FUSED, "folded": []}]})
    smoothing.apply_to_modules(model)
    model.hf_quantizer.record.transforms.append(smoothing)
    model = finish(model, model.hf_quantizer)
    plain = run(model)
    with pytest.raises(ValueError, match=f"it changes {FUSED[0]}, whose stored weight is what a transform made of it"):
        model.load_lora_adapter(dora(["to_q"]), adapter_name="one")
    assert torch.equal(run(model), plain)
    model.load_lora_adapter(adapter(model, 1), adapter_name="two")
    with_two = run(model)
    assert not torch.equal(with_two, plain)
    with pytest.raises(ValueError, match=f"it changes {FUSED[0]}"):
        model.load_lora_adapter(dora(["to_q"]), adapter_name="three")
    assert torch.equal(run(model), with_two), "the one before stays"
    model.load_lora_adapter(dora(["to_k"]), adapter_name="four")


def test_two_loras_are_rounded_together() -> None:
    model: Any = flux()
    before = codes(model)
    model.load_lora_adapter(adapter(model, 1), adapter_name="one")
    model.load_lora_adapter(adapter(model, 2), adapter_name="two")
    model.set_adapters(["one", "two"], [0.7, -0.4])
    expected = run(model)
    model.fuse_lora(adapter_names=["one", "two"])
    layer = model.get_submodule(FUSED[0])
    total = layer.unfused_weights[FUSED[0]].dequantize() + layer.get_delta_weight("one") + layer.get_delta_weight("two")
    assert torch.equal(layer.base_layer.weight.dequantize(), quantized_alone(total, "w4a6"))
    assert (run(model) - expected).norm() < 0.2 * expected.norm()
    model.disable_lora()  # which PEFT says of a fused one by unfusing it
    run(model)
    assert same(codes(model), before) == set()


def test_what_was_fused_is_saved_once_the_lora_is_unloaded(tmp_path: Path) -> None:
    model: Any = flux()
    model.load_lora_adapter(adapter(model, 1), adapter_name="one")
    model.fuse_lora()
    expected = run(model)
    with pytest.raises(ValueError, match="carries a fused LoRA; call unfuse_lora"):
        model.dequantize()
    model.unload_lora()
    model.save_pretrained(tmp_path / "fused")
    again = load_modules(tmp_path / "fused")
    assert torch.equal(run(again), expected)
    assert same(codes(again), codes(model)) == set()


def test_a_model_whose_class_knows_no_lora_fuses_what_peft_put_into_it() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = quantize_modules(tiny_pipeline(layers=2).transformer)
    before = codes(model)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "proj_out"], init_lora_weights=False), model)
    unfused = run(model)
    model.fuse_lora()
    low = {name for name in before if name.endswith("to_q.weight")}
    assert same(codes(model), before) == low
    assert (run(model) - unfused).norm() < 0.2 * unfused.norm()
    model.unfuse_lora()
    assert same(codes(model), before) == set()
    torch.testing.assert_close(run(model), unfused)


def test_half_precision_and_a_move_between_fusing_and_unfusing() -> None:
    model: Any = flux().to(torch.bfloat16)
    before = codes(model)
    model.load_lora_adapter(adapter(model, 1), adapter_name="one")
    model.fuse_lora(safe_fusing=True)
    assert {w.dtype for w in low_bit(model).values()} == {torch.bfloat16}
    model.to(torch.float32)
    model.unfuse_lora()
    assert {w.dtype for w in low_bit(model).values()} == {torch.float32}
    assert same(codes(model), before) == set()


def test_what_cannot_be_fused_is_refused_before_anything_changes() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = quantize_modules(tiny_pipeline(layers=1).transformer)
    broken = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=False), broken)
    unpacked = unpack_weights(copy.deepcopy(broken))
    with pytest.raises(ValueError, match="fusing a LoRA needs packed weights"):
        unpacked.fuse_lora()
    other = copy.deepcopy(model)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q"], alora_invocation_tokens=[1]), other)
    with pytest.raises(ValueError, match=r"attn1.to_q carries ALora.*, which cannot be fused"):
        other.fuse_lora()
    before = codes(broken)
    for name, p in broken.named_parameters():
        if "attn2" in name and "lora_A" in name:
            p.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"attn2.to_q.weight.*NaN"):
        broken.fuse_lora()
    broken.unfuse_lora()
    assert same(codes(broken), before) == set()
