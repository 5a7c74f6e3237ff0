"""One call quantizes a pipeline; what comes out generates, saves and loads like any diffusers pipeline."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fp4dit_ao import AdaRoundConfig, MinifloatTensor, ReconstructionConfig, load_pipeline, quantize_pipeline, w4a6_auto
from fp4dit_ao.calibration.pipeline_arguments import generation_defaults
from fp4dit_ao.diffusers_integration.folders_and_devices import resolve_folder
from fp4dit_ao.diffusers_integration.layer_summary import LayerSummary, layer_lines
from fp4dit_ao.kernels import attention
from tests.conftest import ROOT
from tests.tiny import CALL, tiny_pipeline

PROMPTS = ["a red cat", "a blue dog"]


@pytest.fixture(scope="module")
def original() -> Any:
    return tiny_pipeline(layers=1)


@pytest.fixture(scope="module")
def quantized(original: Any) -> Any:
    how = {"adaround": AdaRoundConfig(iters=4, batch_size=2), "skip": ["*attn2*"], "progress": False}
    return quantize_pipeline(original, "w4a6", prompts=PROMPTS, samples=2, **how, **CALL)


@pytest.fixture(scope="module")
def folder(quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    quantized.generation_defaults = {"num_inference_steps": 2}
    path = tmp_path_factory.mktemp("saved") / "pipe"
    quantized.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, prompt: Any = "a red cat", **call: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(3)
    images = pipe(prompt, **(CALL | call), generator=generator, output_type="np").images
    return np.asarray(images)


# --- quantizing ------------------------------------------------------------------------------------------------------


def test_the_quantized_pipeline_draws_something_like_the_original(original: Any, quantized: Any) -> None:
    a, b = draw(original), draw(quantized)
    assert a.shape == b.shape
    assert 0 < np.abs(a - b).mean() < np.abs(a - a.mean()).mean()


def test_the_original_stays_as_it_was(original: Any, quantized: Any) -> None:
    assert type(original.transformer).__name__ == "PixArtTransformer2DModel"
    assert original.config["transformer"] == ("diffusers", "PixArtTransformer2DModel")
    assert quantized.vae is original.vae
    assert type(quantized) is type(original)
    np.testing.assert_array_equal(draw(original), draw(tiny_pipeline(layers=1)))


def test_the_transformer_looks_like_the_one_it_replaces(original: Any, quantized: Any) -> None:
    new, old = quantized.transformer, original.transformer
    assert new.config.sample_size == old.config.sample_size
    assert new.config["num_layers"] == 1
    assert new.dtype == old.dtype
    assert new.device == old.device
    assert new.out_channels == old.out_channels
    assert not any(p.requires_grad for p in new.parameters() if isinstance(p, MinifloatTensor))


def test_the_summary_has_a_row_for_every_layer(quantized: Any) -> None:
    rows = {row.name: row for row in quantized.transformer.summary()}
    q = rows["transformer_blocks.0.attn1.to_q"]
    assert (q.weight, q.activation, q.shape, q.bytes) == ("e2m1", "e2m3", (128, 128), 128 * 128 // 2 + 4 * 128)
    assert rows["transformer_blocks.0.ff.net.0.proj"].weight == "e3m0"
    assert rows["transformer_blocks.0.attn1"].kind == "attention"
    assert rows["transformer_blocks.0.attn2.to_q"].reason == "name matches '*attn2*'"
    assert not rows["transformer_blocks.0.attn2"].quantized
    out = rows["proj_out"]
    assert (out.weight, out.quantized, out.reason) == ("float32", False, "recipe keeps 'proj_out*'")
    assert quantized.transformer.nbytes() == sum(p.nbytes for p in unpacked(quantized))


def unpacked(pipe: Any) -> list[torch.Tensor]:
    parts: list[torch.Tensor] = []
    for p in pipe.transformer.graph.parameters():
        parts += [p.qdata, p.scale] if isinstance(p, MinifloatTensor) else [p]
    return parts


def test_it_prints_its_layers_formats_and_units(quantized: Any) -> None:
    head, *lines = repr(quantized.transformer).splitlines()
    rows = quantized.transformer.summary()
    count = sum(row.quantized for row in rows)
    assert head.startswith(
        f"QuantizedTransformer(PixArtTransformer2DModel: {count} of {len(rows)} layers quantized, 4.25 bits"
    )
    assert head.endswith("the rest in float32, on cpu)")
    found = {line.split()[0]: re.split(r"\s{2,}", line.strip())[1:] for line in lines}
    assert found.keys() == {row.name for row in rows}
    linear = quantized.transformer.graph.get_parameter("transformer_blocks.0.attn1.to_q.weight")
    assert found["transformer_blocks.0.attn1.to_q"] == ["128×128", "e2m1 × e2m3", str(linear.unit())]
    unit = "int8 scores" if attention.kernels() else "PyTorch's attention"
    assert found["transformer_blocks.0.attn1"][:2] == ["q, k, v", "e2m3"]
    assert found["transformer_blocks.0.attn1"][2].startswith(unit)
    assert found["transformer_blocks.0.attn2.to_q"][1:] == ["float32", "name matches '*attn2*'"]


def test_layers_that_differ_in_their_block_alone_share_a_line() -> None:
    def row(name: str, weight: str = "e2m1") -> LayerSummary:
        return LayerSummary(name, "linear", weight, None, (2, 2), 2, True, "")

    rows = [row("in"), *(row(f"blocks.{i}.fc.0") for i in (0, 1, 2, 4)), row("blocks.3.fc.0", "nf4"), row("blocks.7")]
    assert layer_lines(rows, lambda row: "int8") == [
        "in                    2×2  e2m1  int8",
        "blocks.{0-2, 4}.fc.0  2×2  e2m1  int8",
        "blocks.3.fc.0         2×2  nf4   int8",
        "blocks.7              2×2  e2m1  int8",
    ]


SAVE = """
import sys
from fp4dit_ao import quantize_pipeline
from tests.tiny import CALL, tiny_pipeline
pipe = tiny_pipeline(layers=1)
quantized = quantize_pipeline(pipe, prompts=["a red cat"], rounding="nearest", progress=False, **CALL)
if sys.argv[2] == "draw":
    quantized("a dog", **(CALL | {"max_sequence_length": 4, "num_inference_steps": 1}))
quantized.save_pretrained(sys.argv[1])
"""


def test_two_processes_save_the_same_bytes(tmp_path: Path) -> None:
    """Whatever the order of sets, and whatever was drawn before: tokenizers keep the length of their last call."""
    runs = []
    for seed, way in (("1", "save"), ("2", "draw")):
        command = [sys.executable, "-c", SAVE, str(tmp_path / way), way]
        runs.append(subprocess.Popen(command, env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}))
    assert [run.wait(500) for run in runs] == [0, 0]
    saved, drawn = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "save", tmp_path / "draw")
    )
    assert saved.keys() == drawn.keys()
    assert [name for name in saved if saved[name] != drawn[name]] == []


def test_the_report_is_kept(quantized: Any) -> None:
    assert len(quantized.transformer.report.rows) >= 1


def test_one_layers_static_ranges_are_calibrated_though_weights_are_rounded_to_nearest(original: Any) -> None:
    """A rule for some layers gets the calibration data that it needs, whatever the recipe of the others."""
    found: Any = quantize_pipeline(
        original, "w4a6", prompts=PROMPTS[:1], samples=2, rounding="nearest", layers={"*.ff.*": "w4a6_static"},
        progress=False, **CALL,
    )  # fmt: skip
    x = draw(found)
    assert np.isfinite(x).all() and np.abs(x - draw(original)).mean() < 0.1


def test_formats_chosen_on_data(original: Any, tmp_path: Path) -> None:
    pipe = quantize_pipeline(
        original, w4a6_auto(), prompts=PROMPTS, samples=2, rounding="nearest", progress=False, **CALL
    )
    pipe.save_pretrained(tmp_path / "auto")
    again = load_pipeline(tmp_path / "auto")
    assert [row.weight for row in again.transformer.summary()] == [row.weight for row in pipe.transformer.summary()]
    np.testing.assert_array_equal(draw(again), draw(pipe))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"recipe": "w3a3"}, "unknown recipe 'w3a3'; choose one of"),
        ({"rounding": "up"}, "unknown rounding 'up'; choose one of nearest, scale_aware, adaround, gptq"),
        ({"objective": "beauty"}, "unknown objective 'beauty'; choose one of mse"),
        ({"scope": "world"}, "unknown scope 'world'; choose one of block, layer, window"),
        ({"rounding": "gptq", "reconstruction": ReconstructionConfig()}, "reconstruction has rounding='scale_aware'"),
        ({"adaround": AdaRoundConfig(), "reconstruction": ReconstructionConfig()}, "give one of the two"),
        ({"prompts": []}, "calibration needs prompts"),
        ({"skip": ["blocks.9.*"]}, "matches no linear or attention"),
    ],
)
def test_wrong_arguments_are_refused(original: Any, kwargs: dict[str, Any], message: str) -> None:
    arguments = {"prompts": PROMPTS, "rounding": "nearest", "progress": False} | CALL | kwargs
    with pytest.raises(ValueError, match=message):
        quantize_pipeline(original, **arguments)


def test_pipelines_without_a_float_transformer_are_refused(quantized: Any) -> None:
    from diffusers import DDPMPipeline, UNet2DModel

    unet = UNet2DModel(8, block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
    with pytest.raises(ValueError, match="DDPMPipeline has no transformer to quantize"):
        quantize_pipeline(DDPMPipeline(unet, quantized.scheduler), prompts=PROMPTS)
    with pytest.raises(ValueError, match="the transformer of this PixArtSigmaPipeline is already quantized"):
        quantize_pipeline(quantized, prompts=PROMPTS)


# --- calling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "call"),
    [
        (["a red cat", "a blue dog", "green tree"], {}),
        ("a red cat", {"guidance_scale": 1.0}),
        ("a red cat", {"height": 48, "width": 32}),
        ("a red cat", {"num_images_per_prompt": 2, "num_inference_steps": 3}),
    ],
)
def test_other_batches_sizes_and_guidance(original: Any, quantized: Any, prompt: Any, call: dict[str, Any]) -> None:
    assert draw(quantized, prompt, **call).shape == draw(original, prompt, **call).shape


def sample(quantized: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.zeros(2, 4, 8, 8), "encoder_hidden_states": torch.zeros(2, 8, 128),
        "timestep": torch.ones(2, dtype=torch.int64), "encoder_attention_mask": torch.ones(2, 8, dtype=torch.int64),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip


def test_return_dict_and_positional_arguments(quantized: Any) -> None:
    kwargs = sample(quantized)
    by_name = quantized.transformer(**kwargs).sample
    latents = kwargs.pop("hidden_states")
    (by_position,) = quantized.transformer(latents, **kwargs, return_dict=False)
    assert torch.equal(by_name, by_position)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": 1}, "no argument lora; it takes hidden_states, "),
        ({"attention_mask": torch.ones(2, 16)}, r"attention_mask is fixed to None, found a tensor of shape \(2, 16\)"),
        ({"timestep": 3}, "timestep must be a tensor, found 3"),
        ({"timestep": torch.tensor(3)}, "timestep must have 1 dimensions"),
        (
            {"added_cond_kwargs": None},
            "added_cond_kwargs must be a dict with keys resolution, aspect_ratio, found None",
        ),
    ],
)
def test_calls_that_the_graph_cannot_honour_are_refused(quantized: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"quantized PixArtTransformer2DModel: {message}"):
        quantized.transformer(**(sample(quantized) | change))


@pytest.mark.parametrize("mode", ["compile_graph", "compile_blocks", "compile_repeated_blocks"])
def test_one_compilation_serves_every_batch_and_size(
    quantized: Any, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, **kwargs: compile_(model, **kwargs, backend=backend))
    torch._dynamo.reset()
    eager = draw(quantized)
    getattr(quantized.transformer, mode)()
    try:
        np.testing.assert_allclose(draw(quantized), eager, atol=1e-6)
        draw(quantized, ["a red cat"] * 3)
        draw(quantized, height=48, width=48)
        draw(quantized, max_sequence_length=5)
        assert len(compiled) == 1
        quantized.to("cpu")  # moving goes on working
        draw(quantized)
    finally:
        quantized.transformer.compile_graph(False)


def test_a_pipeline_that_came_from_a_path_can_be_saved(tmp_path: Path) -> None:
    from diffusers import PixArtSigmaPipeline

    tiny_pipeline(layers=1).save_pretrained(tmp_path / "float")
    pipe = PixArtSigmaPipeline.from_pretrained(tmp_path / "float")
    pipe.set_progress_bar_config(disable=True)
    quantized = quantize_pipeline(pipe, "w4a6", prompts=["a cat"], rounding="nearest", progress=False, **CALL)
    quantized.save_pretrained(tmp_path / "quantized")
    assert load_pipeline(tmp_path / "quantized").transformer.source == str(tmp_path / "float")


# --- saving and loading ----------------------------------------------------------------------------------------------


def test_a_loaded_pipeline_draws_the_same_bits(quantized: Any, loaded: Any) -> None:
    np.testing.assert_array_equal(draw(loaded), draw(quantized))
    assert loaded.generation_defaults == {"num_inference_steps": 2}


def test_loaded_weights_are_aligned_as_torchs_own(loaded: Any) -> None:
    """The last bits of a product of one row, such as one timestep's, depend on where in memory its weight begins."""
    assert {part.data_ptr() % 64 for part in unpacked(loaded)} == {0}


def test_a_loaded_pipeline_draws_the_same_bits_one_row_at_a_time(quantized: Any, loaded: Any) -> None:
    np.testing.assert_array_equal(draw(loaded, guidance_scale=1.0), draw(quantized, guidance_scale=1.0))


def test_from_pretrained_loads_the_folder_once_the_package_is_imported(
    folder: Path, quantized: Any, tmp_path: Path
) -> None:
    script = (
        "import sys, numpy, torch, fp4dit_ao; from diffusers import DiffusionPipeline\n"
        "pipe = DiffusionPipeline.from_pretrained(sys.argv[1])\n"
        f"images = pipe('a red cat', **{CALL!r}, generator=torch.Generator().manual_seed(3), output_type='np').images\n"
        "numpy.save(sys.argv[2], images)"
    )
    file = tmp_path / "image.npy"
    subprocess.run([sys.executable, "-c", script, str(folder), str(file)], check=True, capture_output=True)
    np.testing.assert_allclose(np.load(file), draw(quantized), atol=1e-6)


def test_the_folder_is_a_diffusers_folder(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["fp4dit_ao", "QuantizedTransformer"]
    assert generation_defaults(folder) == {"num_inference_steps": 2}
    assert not [path for path in folder.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".pickle")]


def test_other_dtypes(loaded: Any, folder: Path, quantized: Any) -> None:
    half = load_pipeline(folder, dtype=torch.bfloat16)
    half.set_progress_bar_config(disable=True)
    assert half.transformer.dtype == half.vae.dtype == torch.bfloat16
    noise = torch.randn(
        1, 4, 8, 8, generator=torch.Generator().manual_seed(0)
    )  # torch 2.11 draws other noise in bfloat16
    assert np.abs(draw(half, latents=noise.bfloat16()) - draw(quantized, latents=noise)).mean() < 0.05
    before = {k: v for k, v in loaded.transformer.graph.named_parameters() if isinstance(v, MinifloatTensor)}
    after = {k: v for k, v in half.transformer.graph.named_parameters() if isinstance(v, MinifloatTensor)}
    for name, weight in before.items():
        assert torch.equal(weight.qdata, after[name].qdata)
        assert torch.equal(weight.scale, after[name].scale)
        assert after[name].dtype == torch.bfloat16


def test_pipelines_saved_in_half_precision_load_in_half_precision(tmp_path: Path) -> None:
    pipe = tiny_pipeline(layers=1).to(torch.bfloat16)
    pipe = quantize_pipeline(pipe, prompts=PROMPTS, rounding="nearest", progress=False, **CALL)
    pipe.save_pretrained(tmp_path / "half")
    again = load_pipeline(tmp_path / "half")
    assert {c.dtype for c in again.components.values() if isinstance(c, torch.nn.Module)} == {torch.bfloat16}
    np.testing.assert_array_equal(draw(again), draw(pipe))


def test_foreign_folders_are_refused(original: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_pipeline(tmp_path / "none")
    with pytest.raises(ValueError, match=r"is no pipeline: it has no model_index.json"):
        load_pipeline(tmp_path)
    original.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="was not quantized by fp4dit_ao; load it with DiffusionPipeline"):
        load_pipeline(tmp_path / "float")
    assert resolve_folder(tmp_path) == tmp_path


def test_a_damaged_component_is_named(quantized: Any, tmp_path: Path) -> None:
    quantized.save_pretrained(tmp_path / "pipe")
    file = tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model.safetensors is damaged: .*; copy it again"):
        load_pipeline(tmp_path / "pipe")


def test_an_altered_bit_of_another_component_is_found(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pipe")
    file = tmp_path / "pipe" / "vae" / "diffusion_pytorch_model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1000] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"vae/diffusion_pytorch_model.safetensors was altered since it was saved"):
        load_pipeline(tmp_path / "pipe")
    (tmp_path / "pipe" / "checksums.json").unlink()  # as folders of older versions have none
    load_pipeline(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("file", "key", "value", "message"),
    [
        ("text_encoder/config.json", "d_model", "wide", "pipe/text_encoder cannot be loaded as T5EncoderModel: "),
        ("vae/config.json", "block_out_channels", 5, "pipe/vae cannot be loaded as AutoencoderKL: 'int' object"),
        ("model_index.json", "transformer", 5, "model_index.json is damaged: transformer is 5; expected its library"),
        ("model_index.json", "vae", ["diffusers", 5], "model_index.json is damaged: vae is ['diffusers', 5]"),
        (
            "model_index.json",
            "vae",
            ["diffusers", "Nope"],
            "names Nope for vae, and diffusers has no such class",
        ),
        ("generation.json", "height", "tall", "height='tall': PixArtSigmaPipeline takes int"),
    ],
)
def test_damaged_configs_are_refused_in_a_sentence(
    folder: Path, tmp_path: Path, file: str, key: str, value: Any, message: str
) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "pipe")) / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    call = {name: value for name, value in CALL.items() if name != key}
    with pytest.raises(ValueError, match=re.escape(message)):  # a folder's defaults are looked at when it draws
        load_pipeline(tmp_path / "pipe")("a cat", **call)


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_nothing(
    quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr(type(quantized.vae), "save_pretrained", fails)
    with pytest.raises((OSError, KeyboardInterrupt)) as caught:
        quantized.save_pretrained(tmp_path / "out")
    if isinstance(failure, OSError):
        assert (
            str(caught.value)
            == f"cannot save to {tmp_path / 'out'}: No space left on device; nothing was written there"
        )
    assert list(tmp_path.iterdir()) == []


def test_saving_over_other_things_is_refused(quantized: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match="the folder is not empty"):
        quantized.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    quantized.save_pretrained(tmp_path / "pipe")
    quantized.save_pretrained(tmp_path / "pipe")  # a quantized pipeline is replaced
    assert (tmp_path / "pipe" / "model_index.json").is_file()


# --- generation.json -------------------------------------------------------------------------------------------------


def test_generation_defaults(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    (tmp_path / "generation.json").write_text('{"num_inference_steps": 20}')
    assert generation_defaults(tmp_path) == {"num_inference_steps": 20}
    for bad, message in (("{", "is not valid JSON"), ("[1]", "must hold a JSON object")):
        (tmp_path / "generation.json").write_text(bad)
        with pytest.raises(ValueError, match=message):
            generation_defaults(tmp_path)


def test_importing_the_package_loads_neither_diffusers_nor_transformers() -> None:
    script = (
        "import sys, fp4dit_ao, fp4dit_ao.calibration, fp4dit_ao.families\n"
        "import fp4dit_ao.checkpoint.transformer_folder\n"
        "assert not {'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
