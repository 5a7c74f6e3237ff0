"""Plain diffusers calls load, quantize, save and publish quantized transformers, once ``fp4dit_ao`` is imported."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from diffusers.quantizers import PipelineQuantizationConfig
from torch import nn

from fp4dit_ao import (
    FP4DiTConfig,
    MinifloatTensor,
    QuantizedTransformer,
    load_pipeline,
    quantize_modules,
    quantize_pipeline,
)
from fp4dit_ao.diffusers_integration.graph_form import load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from tests.tiny import CALL, tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def graph() -> Any:
    return quantize_pipeline(
        tiny_pipeline(layers=1), "w4a6", prompts=["a cat"], rounding="nearest", progress=False, **CALL
    )


@pytest.fixture(scope="module")
def folders(graph: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline as it was (float), in the graph form, and in the module form."""
    root = tmp_path_factory.mktemp("saved")
    tiny_pipeline(layers=1).save_pretrained(root / "float")
    graph.save_pretrained(root / "graph")
    load_pipeline(root / "graph", form="module").save_pretrained(root / "module")
    return {name: root / name for name in ("float", "graph", "module")}


def draw(pipe: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return np.asarray(pipe("a red cat", **CALL, generator=generator, output_type="np").images)


def quantized_weights(model: nn.Module) -> int:
    return sum(isinstance(p, MinifloatTensor) for p in model.parameters())


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["graph", "module"])
def test_every_form_loads_every_folder(graph: Any, folders: dict[str, Path], form: str) -> None:
    expected = draw(graph)
    model = PixArtTransformer2DModel.from_pretrained(folders[form], subfolder="transformer")
    assert type(model) is PixArtTransformer2DModel
    assert quantized_weights(model) == 10
    graph_again = load_pipeline(folders[form])
    assert isinstance(graph_again.transformer, QuantizedTransformer)
    np.testing.assert_array_equal(draw(graph_again), expected)
    np.testing.assert_array_equal(draw(load_pipeline(folders[form], form="module")), expected)
    plain = PixArtSigmaPipeline.from_pretrained(folders[form])
    assert isinstance(plain.transformer, QuantizedTransformer if form == "graph" else PixArtTransformer2DModel)
    np.testing.assert_array_equal(draw(plain), expected)


@pytest.mark.parametrize("form", ["graph", "module"])
def test_another_process_draws_the_same_bits(graph: Any, folders: dict[str, Path], form: str, tmp_path: Path) -> None:
    """Through plain ``from_pretrained``; ``fp4dit_ao`` is imported after diffusers here, and before it elsewhere."""
    script = (
        "import sys, numpy, torch\n"
        f"torch.set_num_threads({torch.get_num_threads()})\n"
        "from diffusers import DiffusionPipeline\nimport fp4dit_ao\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        f"images = pipe('a red cat', **{CALL!r}, generator=torch.Generator().manual_seed(3), output_type='np').images\n"
        "numpy.save(sys.argv[2], images)"
    )
    file = tmp_path / "image.npy"
    subprocess.run([sys.executable, "-c", script, str(folders[form]), str(file)], check=True, capture_output=True)
    np.testing.assert_array_equal(np.load(file), draw(graph))


def test_another_type(folders: dict[str, Path]) -> None:
    stored = load_modules(folders["module"] / "transformer")
    model = PixArtTransformer2DModel.from_pretrained(folders["module"] / "transformer", torch_dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, weight in stored.named_parameters():
        if isinstance(weight, MinifloatTensor):
            assert torch.equal(model.get_parameter(name).scale, weight.scale)  # not rounded to bfloat16


def test_an_altered_tensor_and_an_altered_config_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["module"] / "transformer", tmp_path / "t"))
    data = bytearray((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"tensor \S+ was altered since it was saved"):
        PixArtTransformer2DModel.from_pretrained(folder)
    (folder / WEIGHTS).write_bytes(data)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"norm_eps": 1e-06', '"norm_eps": 1e-05', 1))
    with pytest.raises(ValueError, match=r"its config.json was altered since it was saved: its 'norm_eps' is 1e-05"):
        PixArtTransformer2DModel.from_pretrained(folder)


# --- quantizing while loading ----------------------------------------------------------------------------------------


def test_a_float_pipeline_is_quantized_while_it_loads(graph: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """To the codes that the graph form has, formats before gates included."""
    how = PipelineQuantizationConfig(quant_mapping={"transformer": FP4DiTConfig("w4a6")})
    pipe = PixArtSigmaPipeline.from_pretrained(folders["float"], quantization_config=how)
    assert type(pipe.transformer) is PixArtTransformer2DModel
    np.testing.assert_array_equal(draw(pipe), draw(graph))
    pipe.save_pretrained(tmp_path / "pipe")
    config = json.loads((tmp_path / "pipe" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["source"] == str(folders["float"] / "transformer")
    np.testing.assert_array_equal(draw(load_pipeline(tmp_path / "pipe")), draw(graph))


def test_no_float_weight_outlives_its_rounding(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight by weight: when one is quantized, those before it are."""
    from fp4dit_ao.diffusers_integration import module_form

    seen: list[int] = []
    original = module_form.quantize_linear

    def watch(model: nn.Module, name: str, config: Any) -> None:
        weights = [model.get_submodule(n).weight for n in names]
        seen.append(sum(not isinstance(w, MinifloatTensor) and not w.is_meta for w in weights))
        original(model, name, config)

    reference = PixArtTransformer2DModel.from_pretrained(folders["module"] / "transformer")
    names = [n.removesuffix(".weight") for n, p in reference.named_parameters() if isinstance(p, MinifloatTensor)]
    monkeypatch.setattr(module_form, "quantize_linear", watch)
    PixArtTransformer2DModel.from_pretrained(
        folders["float"], subfolder="transformer", quantization_config=FP4DiTConfig("w4a6")
    )
    assert seen == [1] * 10


def test_one_config_serves_two_models(folders: dict[str, Path]) -> None:
    config = FP4DiTConfig("w4a6_e2m1", skip=["*attn2*"])
    assert "w4a6_e2m1" in repr(config)
    one, two = (
        PixArtTransformer2DModel.from_pretrained(folders["float"], subfolder="transformer", quantization_config=config)
        for _ in range(2)
    )
    assert quantized_weights(one) == quantized_weights(two) == 6
    assert one.hf_quantizer.record is not two.hf_quantizer.record
    with pytest.raises(ValueError, match="unknown recipe 'w3'"):
        FP4DiTConfig("w3")


# --- saving ----------------------------------------------------------------------------------------------------------


def test_shards_are_diffusers_own(folders: dict[str, Path], tmp_path: Path) -> None:
    model = PixArtTransformer2DModel.from_pretrained(folders["module"] / "transformer")
    model.save_pretrained(tmp_path / "t", max_shard_size="100KB")
    index = json.loads((tmp_path / "t" / f"{WEIGHTS}.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2
    assert {path.name for path in (tmp_path / "t").glob("*.safetensors")} == files
    assert all(name.endswith(f"-of-{len(files):05}.safetensors") for name in files)
    again = PixArtTransformer2DModel.from_pretrained(tmp_path / "t")
    graph = load_graph(tmp_path / "t")
    for name, weight in model.named_parameters():
        for other in (again.get_parameter(name), graph.graph.get_parameter(name)):
            parts = ("qdata", "scale") if isinstance(weight, MinifloatTensor) else ("data",)
            assert all(torch.equal(getattr(weight, part), getattr(other, part)) for part in parts)
    again.save_pretrained(tmp_path / "t")  # in one file again: no shard is left behind
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["config.json", WEIGHTS]
    assert quantized_weights(PixArtTransformer2DModel.from_pretrained(tmp_path / "t")) == 10


class Hub:
    """Takes the place of the hub's API: keeps what would have been uploaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.uploads: dict[str, dict[str, bytes]] = {}
        from diffusers.utils import hub_utils

        monkeypatch.setattr(hub_utils, "create_repo", lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
        monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *_, **__: Card())
        monkeypatch.setattr(hub_utils, "populate_model_card", lambda card: card)
        monkeypatch.setattr(hub_utils, "upload_folder", self.upload)

    def upload(self, repo_id: str, folder_path: str, **_: Any) -> str:
        root = Path(folder_path)
        self.uploads[repo_id] = {
            str(p.relative_to(root)): p.read_bytes()
            for p in sorted(root.rglob("*"))
            if p.is_file() and p.name != "README.md"
        }
        return repo_id


class Card:
    def save(self, path: str) -> None:
        Path(path).write_text("card")


def test_push_to_hub(graph: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = Hub(monkeypatch)
    modules = DiffusionPipeline.from_pretrained(folders["module"])
    things = {
        "me/graph": graph.transformer,
        "me/module": modules.transformer,
        "me/pipe": graph,
        "me/plain": modules,
    }
    for repo, thing in things.items():
        thing.push_to_hub(repo)
    modules.transformer.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved")
    graph.save_pretrained(tmp_path / "pipe", push_to_hub=True)
    assert set(hub.uploads) == {*things, "me/saved", "pipe"}
    for repo in ("me/graph", "me/module", "me/saved"):
        assert set(hub.uploads[repo]) == {"config.json", WEIGHTS}
    for repo in ("me/pipe", "me/plain", "pipe"):
        for name, data in hub.uploads[repo].items():
            (tmp_path / repo / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / repo / name).write_bytes(data)
        np.testing.assert_array_equal(draw(load_pipeline(tmp_path / repo)), draw(graph))


def test_pickles_and_variants_are_refused(graph: Any, tmp_path: Path) -> None:
    for model in (graph.transformer, quantize_modules(tiny_pipeline(layers=1).transformer)):
        with pytest.raises(ValueError, match="saved as safetensors only"):
            model.save_pretrained(tmp_path / "t", safe_serialization=False)
        with pytest.raises(ValueError, match="has no variant 'fp16'"):
            model.save_pretrained(tmp_path / "t", variant="fp16")
        with pytest.raises(ValueError, match="saved as safetensors only"):
            model.save_pretrained(tmp_path / "t", use_flashpack=True)


def test_every_way_to_save_writes_codes_or_says_what_does(folders: dict[str, Path], tmp_path: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folders["module"])
    model = PixArtTransformer2DModel.from_pretrained(folders["module"], subfolder="transformer")
    expected = json.loads((folders["module"] / "transformer" / "config.json").read_text())["quantization_config"]
    ways = {
        "model": lambda to: model.save_pretrained(to / "transformer"),
        "compiled": lambda to: torch.compile(model).save_pretrained(to / "transformer"),
        "pipeline": lambda to: PixArtSigmaPipeline(**(pipe.components | {"transformer": model})).save_pretrained(to),
        "class of the pipeline": lambda to: type(pipe).save_pretrained(pipe, to),
    }
    for name, save in ways.items():
        save(tmp_path / name)
        found = json.loads((tmp_path / name / "transformer" / "config.json").read_text())["quantization_config"]
        assert found["tensors"] == expected["tensors"], name
    with pytest.raises(ValueError, match=r"cannot write low-bit weights; call the instance's, model.save_pretrained"):
        type(model).save_pretrained(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()


# --- registration ----------------------------------------------------------------------------------------------------


def test_diffusers_learns_of_the_quantizer_when_it_is_imported() -> None:
    script = (
        "import sys, fp4dit_ao\n"
        "assert 'diffusers' not in sys.modules\n"
        "import diffusers.quantizers.auto as auto\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['fp4dit_ao'] is fp4dit_ao.FP4DiTConfig\n"
        "assert 'fp4dit_ao' in auto.AUTO_QUANTIZER_MAPPING\n"
        "import diffusers.pipelines.auto_pipeline\n"
        "assert not any(type(f).__module__.startswith('fp4dit_ao') for f in sys.meta_path)\n"
        "assert auto.__spec__.loader.get_source(auto.__name__)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_foreign_quantizer_is_left_alone() -> None:
    from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING, DiffusersAutoQuantizer

    assert {"torchao", "bitsandbytes_4bit", "fp4dit_ao"} <= set(AUTO_QUANTIZER_MAPPING)
    with pytest.raises(ValueError, match="Unknown quantization type"):
        DiffusersAutoQuantizer.from_dict({"quant_method": "unheard-of"})
