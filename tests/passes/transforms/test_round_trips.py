"""Transformed models on disk and in both forms: saved, loaded, cast, exported, given LoRAs, the same bits everywhere."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks.families import small_model
from fp4dit_ao import (
    FP4DiTConfig,
    QuantizedTransformer,
    capture,
    collect_samples,
    example_inputs,
    export_single_file,
    lower,
    quantize_modules,
    quantize_pipeline,
    quantizer_for,
    read_single_file,
    transform,
)
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.checkpoint.quantization_record import Record, digest
from fp4dit_ao.cli import inspect as inspection
from fp4dit_ao.deploy import exported_transformer
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.diffusers_integration.module_form import dequantize_modules, finish
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.passes.transforms.scaled_linear import ScaledLinear
from fp4dit_ao.passes.transforms.smoothquant import SmoothQuant
from fp4dit_ao.passes.transforms.split_inputs import SplitInputs, SplitLinear
from tests.tiny import CALL, tiny_pipeline

PROMPTS = ["a red cat", "a blue dog"]
QUERY = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline(layers=1)


@pytest.fixture(scope="module")
def sample(pipe: Any) -> dict[str, Any]:
    return collect_samples(pipe, PROMPTS, samples=1, progress=False, **CALL)[0]


def smoothed(pipe: Any, recipe: Any = "w4a6_e2m1", **options: Any) -> QuantizedTransformer:
    method = SmoothQuant(points=2, rows=32, **options)
    quantized = quantize_pipeline(
        pipe, recipe, prompts=PROMPTS, samples=2, rounding="nearest", transforms=[method], progress=False, **CALL
    )
    return quantized.transformer


@pytest.fixture(scope="module")
def model(pipe: Any) -> QuantizedTransformer:
    return smoothed(pipe)


@pytest.fixture(scope="module")
def folder(model: QuantizedTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("smoothed") / "transformer"
    model.save_pretrained(path)
    return path


@torch.no_grad()
def run(model: Any, sample: dict[str, Any]) -> Tensor:
    found: Tensor = model(**sample, return_dict=False)[0]
    return found


def written(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def scales(record: dict[str, Any]) -> list[str]:
    return sorted(name for name in record["tensors"] if name.endswith(".smooth_scale"))


# --- the same bits ---------------------------------------------------------------------------------------------------


def test_a_smoothed_model_is_loaded_in_both_forms(
    model: Any, folder: Path, sample: dict[str, Any], tmp_path: Path
) -> None:
    from diffusers import PixArtTransformer2DModel

    expected = run(model, sample)
    modules = load_modules(folder)
    assert isinstance(modules.get_submodule(QUERY), ScaledLinear)
    forms = {
        "graph": load_graph(folder), "modules": modules, "shared": model.to_modules(),
        "diffusers": PixArtTransformer2DModel.from_pretrained(folder),
    }  # fmt: skip
    for name, form in forms.items():
        assert torch.equal(run(form, sample), expected), name
    for name in ("modules", "shared", "diffusers"):
        forms[name].save_pretrained(tmp_path / name)
        assert written(tmp_path / name)["transforms"] == written(folder)["transforms"]
        assert scales(written(tmp_path / name)) == scales(written(folder))
        assert torch.equal(run(load_graph(tmp_path / name), sample), expected), name


def test_factors_are_tensors_and_records_are_names(folder: Path) -> None:
    found = written(folder)
    assert found["format_version"] == 3
    assert "parts" not in found
    [record] = found["transforms"]
    assert record["name"] == "smoothquant"
    attention = {"linears": [QUERY.replace("to_q", name) for name in ("to_q", "to_k", "to_v")], "folded": []}
    assert record["groups"][0] == attention
    names = [f"{group['linears'][0]}.smooth_scale" for group in record["groups"]]
    assert sorted(names) == scales(found)


def test_factors_keep_their_values_in_other_types(model: Any, sample: dict[str, Any]) -> None:
    half = copy.deepcopy(model).to(torch.bfloat16)
    name = f"{QUERY}.smooth_scale"
    assert half.graph.get_buffer(name).dtype == torch.bfloat16
    assert torch.equal(half.graph.get_buffer(name).float(), model.graph.get_buffer(name))
    inputs = {k: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in sample.items()}
    expected = run(model, sample)
    assert float((run(half, inputs).float() - expected).norm() / expected.norm()) < 0.1
    back = half.to(torch.float32)
    assert torch.equal(back.graph.get_buffer(name), model.graph.get_buffer(name))


def test_a_smoothed_model_is_exported(model: Any, sample: dict[str, Any], tmp_path: Path) -> None:
    exported_transformer.save_program(model, tmp_path / "model.pt2")
    with torch.no_grad():
        found = exported_transformer.load(tmp_path / "model.pt2")(**sample)[0]
    assert torch.equal(found, run(model, sample))


def test_one_file_says_what_inputs_are_multiplied_by(model: Any, folder: Path, tmp_path: Path) -> None:
    export_single_file(folder, tmp_path / "out.safetensors")
    file = read_single_file(tmp_path / "out.safetensors")
    names = file.metadata["input_scales"]
    assert names[QUERY] == names[QUERY.replace("to_q", "to_v")] == f"{QUERY}.smooth_scale"
    np.testing.assert_array_equal(file.tensors[names[QUERY]], model.graph.get_buffer(names[QUERY]).numpy())


def test_folded_factors_need_no_tensor(pipe: Any, sample: dict[str, Any], tmp_path: Path) -> None:
    model = smoothed(pipe, fold=True)
    model.save_pretrained(tmp_path / "folded")
    groups = {group["linears"][0]: group["folded"] for group in written(tmp_path / "folded")["transforms"][0]["groups"]}
    values = "transformer_blocks.0.attn1.to_v"
    assert groups["transformer_blocks.0.attn1.to_out.0"] == [f"{values}.weight", f"{values}.bias"]
    expected = run(model, sample)
    assert torch.equal(run(load_graph(tmp_path / "folded"), sample), expected)
    modules = load_modules(tmp_path / "folded")
    assert torch.equal(run(modules, sample), expected)
    assert not isinstance(modules.get_submodule("transformer_blocks.0.attn1.to_out.0"), ScaledLinear)


def test_loras_on_folded_linears_are_refused() -> None:
    """Of the model classes that load LoRAs themselves."""
    model: Any = quantize_modules(small_model("FLUX.1"))
    sample = example_inputs(model)
    folded, free = (f"transformer_blocks.0.attn.{name}" for name in ("to_v", "to_q"))
    record = {"groups": [{"linears": ["transformer_blocks.0.attn.to_out.0"], "folded": [f"{folded}.weight"]}]}
    model.hf_quantizer.record.transforms.append(SmoothQuant.from_record(record))
    model = finish(model, model.hf_quantizer)
    plain = run(model, sample)
    message = (
        r"this LoRA would .*: it changes \S+attn.to_v, whose smoothing .*; quantize with SmoothQuant\(fold=False\)"
    )
    with pytest.raises(ValueError, match=message):
        model.load_lora_adapter(lora(model, folded), adapter_name="one")
    assert torch.equal(run(model, sample), plain), "the refused LoRA is gone"
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), sample), plain)
    model.load_lora_adapter(lora(model, free), adapter_name="two")
    changed = run(model, sample)
    assert not torch.equal(changed, plain)
    with pytest.raises(ValueError, match=message):
        model.load_lora_adapter(lora(model, folded), adapter_name="three")
    assert torch.equal(run(model, sample), changed), "the one before stays"


def test_blocks_of_the_hardware(pipe: Any, sample: dict[str, Any], tmp_path: Path) -> None:
    model = smoothed(pipe, "nvfp4")
    assert any("smooth" in name for name, _ in model.graph.named_buffers())
    model.save_pretrained(tmp_path / "nvfp4")
    assert torch.equal(run(load_graph(tmp_path / "nvfp4"), sample), run(model, sample))
    assert torch.equal(run(load_modules(tmp_path / "nvfp4"), sample), run(model, sample))


# --- with other things -----------------------------------------------------------------------------------------------


def lora(model: nn.Module, name: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    linear: Any = model.get_submodule(name)
    return {
        f"transformer.{name}.lora_A.weight": torch.randn(4, linear.in_features, generator=generator),
        f"transformer.{name}.lora_B.weight": torch.randn(linear.out_features, 4, generator=generator) * 0.1,
    }


@torch.no_grad()
def test_a_lora_sees_the_input_of_the_float_model(folder: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model: Any = load_modules(folder)
    linear = model.get_submodule(QUERY)
    x = torch.randn(3, linear.in_features)
    plain, scale = linear(x), linear.smooth_scale
    effective = linear.weight.dequantize() * scale
    torch.manual_seed(0)
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=4, target_modules=[QUERY], init_lora_weights=False), model)
    layer = model.get_submodule(QUERY)
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(layer(x), plain + x @ product.T)
    model.fuse_lora()
    fused, wanted = layer.base_layer.weight.dequantize() * scale, effective + product
    error = float((fused - wanted).norm() / wanted.norm())
    assert error < 0.15, "one more rounding to four bits"
    assert error < float((effective - wanted).norm() / wanted.norm()) / 2
    model.unfuse_lora()
    torch.testing.assert_close(layer(x), plain + x @ product.T)


@torch.no_grad()
def test_dequantized_modules_are_plain_again(pipe: Any, folder: Path, sample: dict[str, Any]) -> None:
    model = dequantize_modules(load_modules(folder))
    assert not any(isinstance(module, ScaledLinear) for module in model.modules())
    assert model.state_dict().keys() == pipe.transformer.state_dict().keys()
    own, original = model.get_submodule(QUERY).weight, pipe.transformer.get_submodule(QUERY).weight
    assert float((own - original).norm() / original.norm()) < 0.2


def test_weights_are_inspected_against_what_they_were_rounded_from(pipe: Any, model: Any) -> None:
    weights = dict(pipe.transformer.state_dict())
    changed = inspection._transformed(weights, model)
    text = {
        name: inspection.layer_table(model, w, torch.device("cpu"))
        for name, w in (("right", changed), ("wrong", weights))
    }
    [right, wrong] = [
        next(line for line in table.splitlines() if "attn2.to_out" in line).split("|")[-3:-1] for table in text.values()
    ]
    assert right[1].strip() == "0.0%"
    assert float(right[0]) > float(wrong[0]) + 3


@torch.no_grad()
def test_smoothed_and_split(tmp_path: Path) -> None:
    model = small_model("Hunyuan-DiT")
    model.blocks[3].skip_norm.weight[5] = 40.0  # a channel that smoothing finds
    sample = example_inputs(model)
    quantizer = quantizer_for(model, "w4a6")
    graph = transform(capture(model, sample), [sample], [SmoothQuant(points=2, rows=16)], quantizer, progress=False)
    lowered = lower(convert_pt2e(prepare_pt2e(graph, quantizer), fold_quantize=False))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), lowered)
    quantized = QuantizedTransformer(lowered, model, sample_description.describe(bind(model, sample)), decisions)
    quantized.save_pretrained(tmp_path / "both")
    assert [record["name"] for record in written(tmp_path / "both")["transforms"]] == ["smoothquant", "split_inputs"]
    expected = run(quantized, sample)
    assert torch.equal(run(load_graph(tmp_path / "both"), sample), expected)
    modules = load_modules(tmp_path / "both")
    skip = modules.blocks[3].skip_linear
    assert isinstance(skip, SplitLinear)
    assert skip.smooth_scale.shape == (256,)
    assert torch.equal(run(modules, sample), expected)


# --- versions of the format ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def split() -> nn.Module:
    return quantize_modules(small_model("Hunyuan-DiT"), "w4a6")


def test_files_of_version_2_are_read(split: Any, tmp_path: Path) -> None:
    """What was written before there were transforms: inputs that are split, under ``parts``."""
    sample = example_inputs(small_model("Hunyuan-DiT"))
    split.save_pretrained(tmp_path / "split")
    path = tmp_path / "split" / "config.json"
    config = json.loads(path.read_text())
    quantization = config["quantization_config"]
    assert quantization["format_version"] == 2
    assert quantization["parts"] == {"blocks.3.skip_linear": [128, 128]}
    assert "transforms" not in quantization, "readers of version 2 find what they know"
    for form in (load_graph, load_modules):
        assert torch.equal(run(form(tmp_path / "split"), sample), run(split, sample))
    # the same, said as version 3 says it
    quantization |= {"format_version": 3, "transforms": [{"name": "split_inputs", "parts": quantization.pop("parts")}]}
    quantization.pop("sha256")
    path.write_text(json.dumps(config | {"quantization_config": quantization | {"sha256": digest(quantization)}}))
    assert torch.equal(run(load_graph(tmp_path / "split"), sample), run(split, sample))


@pytest.mark.parametrize(
    ("transforms", "found"),
    [
        ([{"name": "sharpen"}], "unknown transform 'sharpen'; choose one of smoothquant, "),
        ([{"name": "smoothquant"}], "KeyError"),
        ([{"name": "smoothquant", "groups": [{"linears": [], "folded": []}]}], "is empty"),
        ([{"parts": {}}], "KeyError"),
        (3, "TypeError"),
    ],
)
def test_damaged_records_are_refused(folder: Path, transforms: Any, found: str) -> None:
    data = {k: v for k, v in written(folder).items() if k != "sha256"} | {"transforms": transforms}
    with pytest.raises(ValueError, match=f"x is damaged: its quantization_config cannot be read .*{found}"):
        Record.from_json(data | {"sha256": digest(data)}, "x")


@pytest.mark.parametrize("name", ["transformer_blocks.7.attn1.to_q", "transformer_blocks.0.norm1", "pos_embed.proj"])
def test_records_of_another_model_are_refused(folder: Path, name: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    config = json.loads((other / "config.json").read_text())
    data = {k: v for k, v in config["quantization_config"].items() if k != "sha256"}
    data["transforms"][0]["groups"][0]["linears"][0] = name
    (other / "config.json").write_text(json.dumps(config | {"quantization_config": data | {"sha256": digest(data)}}))
    for load in (load_graph, load_modules):
        with pytest.raises(ValueError, match=f"does not fit its own config: .*{name}"):
            load(other)


# --- without data ----------------------------------------------------------------------------------------------------


def test_without_data_only_inputs_are_split(pipe: Any) -> None:
    message = (
        r"transform 'smoothquant' needs calibration data; use quantize_pipeline\(…, transforms=\['smoothquant'\]\)"
    )
    for transforms in (["smoothquant"], [SmoothQuant()]):
        with pytest.raises(ValueError, match=message):
            FP4DiTConfig(transforms=transforms)
        with pytest.raises(ValueError, match=message):
            quantize_modules(pipe.transformer, transforms=transforms)
    with pytest.raises(ValueError, match="unknown transform 'sharpen'; choose one of"):
        FP4DiTConfig(transforms=["sharpen"])
    with pytest.raises(ValueError, match="unknown transform 'sharpen'; choose one of"):
        quantize_pipeline(pipe, prompts=PROMPTS, transforms=["sharpen"])
    model = small_model("FLUX.1")
    plain = quantize_modules(copy.deepcopy(model), "w4a6_e2m1")
    split = quantize_modules(model, "w4a6_e2m1", transforms=[SplitInputs()])
    parts = [name for name, module in split.named_modules() if isinstance(module, SplitLinear)]
    assert "single_transformer_blocks.0.proj_out" in parts
    assert len(parts) >= sum(isinstance(module, SplitLinear) for module in plain.modules())
