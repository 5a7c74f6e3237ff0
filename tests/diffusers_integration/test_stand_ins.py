"""What other libraries expect of the classes that stand in for theirs: type, constructor, copies, hooks, loaders."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import example_inputs
from fp4dit_ao.diffusers_integration.attention_processors import quantizing
from fp4dit_ao.passes.transforms.scaled_linear import ScaledLinear
from fp4dit_ao.passes.transforms.split_inputs import SplitLinear
from tests.diffusers_integration.test_lora import flux
from tests.diffusers_integration.test_module_form import run

RECIPES = ["w4a6", "w4a6_codebook", "nvfp4", "mxfp6_e2m3", "nvfp4_four_over_six_both"]
"""One for every kind of weight that a model can be quantized to."""
SPLIT = "single_transformer_blocks.0.proj_out"


@functools.cache
def quantized(recipe: str) -> Any:
    return flux(recipe)


def model_of(recipe: str) -> Any:
    """A model of the test's own; quantizing takes seconds, copying none."""
    return copy.deepcopy(quantized(recipe))


def weights_of(model: nn.Module) -> list[Any]:
    return [p for p in model.parameters() if hasattr(p, "qdata")]


def parts_of(weight: Any) -> list[Tensor]:
    from fp4dit_ao.checkpoint.graph_tensors import flatten

    return [x.contiguous().reshape(-1).view(torch.uint8) for x in flatten("", weight.detach()).values()]


def same(ours: Any, theirs: Any) -> bool:
    return type(ours) is type(theirs) and all(map(torch.equal, parts_of(ours), parts_of(theirs)))


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_class_of_a_weight_makes_a_parameter_of_it(recipe: str) -> None:
    """As nn.Parameter does; accelerate and PEFT call ``type(parameter)(tensor, requires_grad=…)``."""
    for weight in weights_of(quantized(recipe)):
        again = type(weight)(weight, requires_grad=weight.requires_grad)
        assert isinstance(again, nn.Parameter)
        assert not again.requires_grad
        assert same(again, weight)


def kinds_of_weights() -> set[str]:
    """Names of the package's classes of low-bit weights."""

    def below(cls: type) -> set[type]:
        return {cls, *(found for child in cls.__subclasses__() for found in below(child))}

    return {cls.__name__ for cls in below(TorchAOBaseTensor) if cls.__module__.startswith("fp4dit_ao")} - {
        "QuantizedWeight"
    }


def test_every_kind_of_weight_is_among_them() -> None:
    tried = {type(w).__name__ for recipe in RECIPES for w in weights_of(quantized(recipe))}
    assert kinds_of_weights() - {"LevelTensor"} == tried  # unpacked weights exist in memory alone


# --- modules and processors ------------------------------------------------------------------------------------------


def test_modules_are_linears() -> None:
    whole = nn.Linear(8, 4)
    for stand_in in (SplitLinear(whole, [2, 6]), ScaledLinear(whole, torch.ones(8))):
        assert isinstance(stand_in, nn.Linear)
        assert (stand_in.in_features, stand_in.out_features) == (8, 4)
        assert torch.equal(stand_in.weight, whole.weight)
        assert torch.equal(stand_in.bias, whole.bias)


def test_the_class_of_a_processor_makes_another_one() -> None:
    from diffusers.models import attention_processor as known

    for cls in (
        known.AttnProcessor,
        known.AttnProcessor2_0,
        known.JointAttnProcessor2_0,
        known.FusedJointAttnProcessor2_0,
    ):
        processor = quantizing(cls, "e2m3")()
        assert isinstance(processor, cls)
        assert type(pickle.loads(pickle.dumps(processor))) is type(processor)
        assert type(copy.deepcopy(processor)) is type(processor)


def test_processors_that_come_later_quantize_too() -> None:
    model = model_of("w4a6")
    plain = run(model)
    fmt = {p.quantized_fmt for p in model.attn_processors.values()}
    model.set_attn_processor({name: type(p).__mro__[1]() for name, p in model.attn_processors.items()})
    assert {p.quantized_fmt for p in model.attn_processors.values()} == fmt
    assert torch.equal(run(model), plain)
    model.dequantize()
    assert not any(hasattr(p, "quantized_fmt") for p in model.attn_processors.values())
    model.set_attn_processor({name: type(p)() for name, p in model.attn_processors.items()})
    assert not any(hasattr(p, "quantized_fmt") for p in model.attn_processors.values())


# --- copies of models ------------------------------------------------------------------------------------------------


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_another_process(model: Any) -> Any:
    """What ``torch.multiprocessing.spawn`` sends."""
    return ForkingPickler.loads(bytes(ForkingPickler.dumps(model)))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("through", [copy.deepcopy, through_pickle, through_torch_save, through_another_process])
def test_copies_of_a_model(through: Callable[[Any], Any], recipe: str) -> None:
    if through is through_pickle and recipe not in ("w4a6", "w4a6_codebook"):
        pytest.skip("torch's tensors of FP8 cannot be pickled this way, block scales being FP8")
    model = model_of(recipe)
    copied = through(model)
    assert torch.equal(run(copied), run(model))
    assert copied.save_pretrained.args[0] is copied  # not that of the original
    attention = copied.transformer_blocks[0].attn
    assert not hasattr(attention.processor, "quantized_fmt") or attention.set_processor.args[0] is attention


# --- PEFT ------------------------------------------------------------------------------------------------------------


def lora_on(name: str, model: Any, alpha: float = 0.1) -> dict[str, Tensor]:
    linear, generator = model.get_submodule(name), torch.Generator().manual_seed(1)
    return {
        f"transformer.{name}.lora_A.weight": torch.randn(4, linear.in_features, generator=generator),
        f"transformer.{name}.lora_B.weight": torch.randn(linear.out_features, 4, generator=generator) * alpha,
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_lora_on_a_split_linear(recipe: str) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    model = model_of(recipe)
    linear = model.get_submodule(SPLIT)
    if recipe == "w4a6":
        assert isinstance(linear, SplitLinear)
    plain, state = run(model), lora_on(SPLIT, model)
    x = torch.randn(3, linear.in_features)
    expected = (
        linear(x) + x @ state[f"transformer.{SPLIT}.lora_A.weight"].T @ state[f"transformer.{SPLIT}.lora_B.weight"].T
    )
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipe.load_lora_weights(dict(state), adapter_name="one")
    layer = model.get_submodule(SPLIT)
    torch.testing.assert_close(layer(x), expected)
    sum_of_both = linear.weight + layer.get_delta_weight("one") if isinstance(linear, SplitLinear) else None
    model.fuse_lora()
    if sum_of_both is not None:
        error = (layer.get_base_layer().weight - sum_of_both).norm() / sum_of_both.norm()
        assert 0.01 < error < 0.15  # one more rounding to nearest
    model.unfuse_lora()
    pipe.unload_lora_weights()
    assert torch.equal(run(model), plain)


def test_state_dicts_with_a_split_linear_load_again() -> None:
    model = model_of("w4a6")
    state = model.state_dict()
    assert state[f"{SPLIT}.weight"].shape == (128, 640)
    assert state[f"{SPLIT}.weight"].untyped_storage().nbytes() == 4
    assert model.load_state_dict(state).missing_keys == []


def test_a_dequantized_model_has_the_float_models_modules() -> None:
    model = model_of("w4a6")
    whole = model.get_submodule(SPLIT).weight
    model.dequantize()
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in flux(None).state_dict().items()
    }
    assert torch.equal(model.get_submodule(SPLIT).weight, whole)


# --- accelerate and diffusers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_sequential_offload(recipe: str) -> None:
    from accelerate import cpu_offload

    model = model_of(recipe)
    expected, inputs = run(model), example_inputs(model)
    cpu_offload(model, torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, expected)
    assert all(p.is_meta for p in model.parameters())


def test_an_ip_adapter_attends_on_quantized_values() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    state: Any = {
        "image_proj": {
            "proj.weight": torch.randn(256, 32), "proj.bias": torch.zeros(256),
            "norm.weight": torch.ones(64), "norm.bias": torch.zeros(64),
        },
        "ip_adapter": {f"0.to_{x}_ip.weight": torch.randn(128, 64) for x in "kv"}
        | {f"0.to_{x}_ip.bias": torch.zeros(128) for x in "kv"},
    }  # fmt: skip
    model = model_of("w4a6")
    plain, inputs = run(model), example_inputs(model)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipe.load_ip_adapter(state, weight_name="", image_encoder_pretrained_model_name_or_path=None)
    assert all(p.quantized_fmt == "e2m3" for p in model.attn_processors.values())
    image = {"ip_adapter_image_embeds": [torch.randn(2, 1, 32)]}
    with torch.no_grad():
        assert not torch.equal(model(**inputs, joint_attention_kwargs=image).sample, plain)
    pipe.unload_ip_adapter()
    assert torch.equal(run(model), plain)
