"""Whatever stands in a user's model compiles at its very first call: nothing is set up inside of one.

A graph that is prepared for calibration is no such thing: its observers look at values, to refuse NaN by a layer's name.
"""

import copy
import functools
import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import (
    FP4DiTQuantizer,
    QuantConfig,
    capture,
    example_inputs,
    load_pipeline,
    lower,
    passes,
    unpack_weights,
)
from fp4dit_ao.config import RECIPES
from fp4dit_ao.diffusers_integration import weight_forms
from fp4dit_ao.diffusers_integration.text_encoders import quantize_text_encoder
from fp4dit_ao.evaluation.layer_speed import layer_speeds
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.passes.block_outlining import outline
from fp4dit_ao.passes.joined_linears import join_linears
from fp4dit_ao.passes.subclass_unwrapping import unwrap
from fp4dit_ao.passes.transforms.hadamard import RotatedLinear, rotation
from fp4dit_ao.passes.transforms.low_rank import LowRankLinear
from fp4dit_ao.passes.transforms.outlier_groups import ReorderedLinear
from fp4dit_ao.passes.transforms.principal_components import ComponentsLinear
from fp4dit_ao.passes.transforms.scaled_linear import ScaledLinear
from fp4dit_ao.passes.transforms.split_inputs import PartLinear, SplitLinear
from fp4dit_ao.passes.transforms.transformed_linear import TransformedLinear
from fp4dit_ao.passes.weight_unpacking import BFLOAT16
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.tensors.levels import TYPES
from fp4dit_ao.util.user_cache import VARIABLE
from tests.conftest import ROOT
from tests.diffusers_integration.test_lora import adapter
from tests.diffusers_integration.test_stand_ins import RECIPES as KINDS
from tests.diffusers_integration.test_stand_ins import model_of
from tests.fresh_compilation import check_first_call
from tests.graphs import TinyDiT
from tests.tiny import tiny_pipeline

ONLINE = [
    name
    for name in RECIPES
    if not (config := QuantConfig.from_name(name)).weights_need_data and scheme_of(config).quantizes_online(config)
]
"""Recipes that quantize a weight without calibration data."""
FORMS = get_args(get_type_hints(load_pipeline)["form"])
WEIGHTS = get_args(get_type_hints(load_pipeline)["weights"])


# --- linears ---------------------------------------------------------------------------------------------------------


def low_bit_linear(recipe: str) -> nn.Linear:
    torch.manual_seed(0)
    config, linear = QuantConfig.from_name(recipe), nn.Linear(256, 64)
    weight = scheme_of(config).round_to_nearest("linear", linear.weight, config)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


@pytest.mark.parametrize("recipe", ONLINE)
def test_a_linear_with_low_bit_weights(recipe: str) -> None:
    check_first_call(low_bit_linear(recipe), torch.randn(2, 3, 256), backend="aot_eager")


@pytest.mark.parametrize("recipe", ["w4a6", "w4a6_codebook"])
@pytest.mark.parametrize("to", [*TYPES, BFLOAT16])
def test_a_linear_with_unpacked_weights(recipe: str, to: str) -> None:
    linear = low_bit_linear(recipe).to(torch.bfloat16)
    check_first_call(unpack_weights(linear, to), torch.randn(2, 3, 256, dtype=torch.bfloat16), backend="aot_eager")


@pytest.mark.parametrize("recipe", KINDS)
def test_the_function_of_plain_tensors_that_is_exported(recipe: str) -> None:
    weight = low_bit_linear(recipe).weight.detach()
    plain = scheme_of(QuantConfig.from_name(recipe)).plain_linear(weight)

    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return plain.function(x, *plain.tensors.values(), *plain.arguments, None)

    check_first_call(Plain(), torch.randn(2, 3, 256))


STAND_INS: dict[type[nn.Linear], Callable[[nn.Linear], nn.Module]] = {
    ComponentsLinear: lambda linear: ComponentsLinear(linear, torch.randn(256, 8) / 16, torch.randn(8, 64) / 16),
    LowRankLinear: lambda linear: LowRankLinear(linear, torch.randn(256, 8) / 16, torch.randn(8, 64) / 16),
    PartLinear: lambda linear: SplitLinear(linear, [0, 256]).parts[1],
    ReorderedLinear: lambda linear: ReorderedLinear(linear, torch.randperm(256)),
    RotatedLinear: lambda linear: RotatedLinear(linear, rotation(64)),
    ScaledLinear: lambda linear: ScaledLinear(linear, torch.rand(256) + 0.5),
    SplitLinear: lambda linear: SplitLinear(linear, [128, 128]),
}
"""Every class that takes the place of a model's linear, made from one."""


@pytest.mark.parametrize("cls", STAND_INS)
@pytest.mark.parametrize("on", [lambda linear: linear, STAND_INS[ScaledLinear]], ids=["alone", "with a scale before"])
def test_a_stand_in_for_a_linear(cls: type[nn.Linear], on: Callable[[nn.Linear], Any]) -> None:
    stand_in = STAND_INS[cls](on(low_bit_linear("w4a6_e2m1")))
    assert type(stand_in) is cls
    check_first_call(stand_in, torch.randn(2, 3, 256), backend="aot_eager")


def test_every_stand_in_is_among_them() -> None:
    for module in pkgutil.walk_packages(passes.__path__, "fp4dit_ao.passes."):
        importlib.import_module(module.name)

    def below(cls: type) -> Iterator[type]:
        for child in cls.__subclasses__():
            yield from (child, *below(child))

    ours = {cls for cls in below(nn.Linear) if cls.__module__.startswith("fp4dit_ao")}
    assert ours == {*STAND_INS, TransformedLinear}


# --- graphs ----------------------------------------------------------------------------------------------------------

INPUTS = {"hidden_states": torch.randn(2, 16, 4), "shift": torch.randn(2, 1, 128), "return_dict": False}


@functools.cache
def stages(recipe: str) -> dict[str, GraphModule]:
    graph = capture(TinyDiT(), INPUTS)
    prepared = prepare_pt2e(copy.deepcopy(graph), FP4DiTQuantizer().set_global(QuantConfig.from_name(recipe)))
    with torch.no_grad():
        prepared(**INPUTS)
    converted = convert_pt2e(prepared)
    return {"captured": graph, "converted": copy.deepcopy(converted), "lowered": lower(converted)}


AFTER_LOWERING: dict[str, Callable[[GraphModule], GraphModule]] = {
    "joined": join_linears, "outlined": outline, "unwrapped": unwrap
}  # fmt: skip


@pytest.mark.parametrize("stage", ["captured", "converted", "lowered", *AFTER_LOWERING])
def test_a_graph_at_every_stage(stage: str) -> None:
    made = stages("w4a6")
    check_first_call(made[stage] if stage in made else AFTER_LOWERING[stage](copy.deepcopy(made["lowered"])), **INPUTS)


@pytest.mark.parametrize("recipe", [*KINDS, "w4a6_static", "w4a6_lowbit_fp"])
def test_a_lowered_graph_of_every_kind_of_weights_and_inputs(recipe: str) -> None:
    check_first_call(stages(recipe)["lowered"], **INPUTS)


# --- transformers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", KINDS)
def test_the_module_form(recipe: str) -> None:
    model = model_of(recipe)
    check_first_call(model, **example_inputs(model))


def test_a_lora_on_top_and_fused() -> None:
    model = model_of("w4a6")
    inputs = example_inputs(model)
    model.load_lora_adapter(adapter(model, 1), adapter_name="one")
    unfused = check_first_call(model, **inputs)
    model.fuse_lora()
    assert not torch.equal(check_first_call(model, **inputs), unfused)


@pytest.fixture(scope="module")
def folder(tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("saved") / "pipe"
    tiny_quantized.save_pretrained(path)
    return path


def wide_is_slow(groups: Any, rows: int, device: torch.device, seconds: float) -> LayerSpeed:
    speed = 0.5 if groups[0][0].shape[0] > 128 else 2.0
    return LayerSpeed(1.0, speed, speed)


@pytest.mark.parametrize(("form", "weights"), [(f, w) for f in FORMS for w in WEIGHTS if (f, w) != ("module", "auto")])
def test_a_loaded_transformer(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, form: Any, weights: Any
) -> None:
    """Loads each form with each form of weights; ``auto`` leaves some packed and makes others bfloat16."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))  # where no speeds are kept that were measured
    monkeypatch.setattr(weight_forms, "layer_speeds", functools.partial(layer_speeds, measurer=wide_is_slow))
    dtype = torch.bfloat16 if weights == "auto" else None
    model = load_pipeline(folder, form=form, weights=weights, dtype=dtype).transformer
    if weights == "auto":
        assert {row.weight for row in model.summary()} >= {"e2m1", "bfloat16"}
    check_first_call(model, **example_inputs(tiny_pipeline(layers=1).transformer, dtype=dtype or torch.float32))


@pytest.mark.parametrize("made", [lambda model: model, copy.deepcopy, lambda model: model.to(torch.bfloat16)])
@pytest.mark.parametrize("form", ["graph", "module"])
def test_a_transformer_that_was_not_loaded(tiny_quantized: Any, form: str, made: Callable[[Any], Any]) -> None:
    graph = copy.deepcopy(tiny_quantized.transformer)
    model = made(graph if form == "graph" else graph.to_modules())
    check_first_call(model, **example_inputs(tiny_pipeline(layers=1).transformer, dtype=model.dtype))


def test_wrong_arguments_are_refused_in_a_compiled_call(tiny_quantized: Any) -> None:
    graph = copy.deepcopy(tiny_quantized.transformer)
    inputs = example_inputs(tiny_pipeline(layers=1).transformer)
    with torch.no_grad(), pytest.raises(ValueError, match="cross_attention_kwargs is fixed to None"):
        torch.compile(graph, backend="eager")(**inputs, cross_attention_kwargs={"scale": 1})


@pytest.mark.parametrize("recipe", [None, "w4a8", "w4a6_codebook", "nvfp4"])
def test_a_text_encoder(recipe: str | None) -> None:
    tokens = torch.tensor([[4, 5, 6, 7, 1, 0, 0, 0]])
    encoder: Any = quantize_text_encoder(tiny_pipeline(layers=1).text_encoder, recipe)
    check_first_call(encoder, input_ids=tokens, attention_mask=(tokens != 0).long())


DRAWN_COMPILED = """
import sys, torch
from fp4dit_ao import load_pipeline
from tests.tiny import CALL
pipe = load_pipeline(sys.argv[1], form=sys.argv[2])
pipe.set_progress_bar_config(disable=True)
run = lambda: torch.tensor(pipe("a cat", **CALL, generator=torch.Generator().manual_seed(0), output_type="np").images)
eager, pipe.transformer = pipe.transformer, torch.compile(pipe.transformer, backend="eager", fullgraph=True)
compiled = run()
pipe.transformer = eager
assert torch.equal(run(), compiled)
"""


@pytest.mark.parametrize("form", FORMS)
def test_a_pipelines_first_call_in_a_new_process(folder: Path, form: str) -> None:
    """Calls a compiled transformer where nothing was imported or looked up before."""
    arguments = [sys.executable, "-c", DRAWN_COMPILED, str(folder), form]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
