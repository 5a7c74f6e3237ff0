"""Every family of the table, in diffusers' own classes at small width: captured, quantized, saved, loaded, compiled."""

import copy
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import typer
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from benchmarks import families
from benchmarks.families import SMALL, main, other_size, quantize, relative, row_of, small_model, table
from fp4dit_ao import (
    AdaRoundConfig,
    QuantConfig,
    QuantizedTransformer,
    capture,
    example_inputs,
    load_pipeline,
    lower,
    quantize_pipeline,
    quantizer_for,
    reconstruct,
)
from fp4dit_ao.checkpoint import graph_tensors
from fp4dit_ao.config import RECIPES
from fp4dit_ao.deploy import exported_transformer
from fp4dit_ao.families import FAMILIES, family_of, recipe_for
from fp4dit_ao.families.sample_inputs import Size
from fp4dit_ao.passes.compilation import compile_graph
from tests.conftest import ROOT
from tests.graphs import TinyDiT, tiny_sample


@functools.cache
def family(name: str) -> SimpleNamespace:
    """A small model, captured, and quantized with nearest rounding."""
    model = small_model(name)
    graph = capture(model, example_inputs(model))
    return SimpleNamespace(name=name, model=model, graph=graph, quantized=quantize(model, graph))


@pytest.fixture(params=list(SMALL))
def case(request) -> SimpleNamespace:
    return family(request.param)


def sizes(name: str) -> Iterator[Size]:
    """Unlike the captured one, each in another way: guidance on two images, one image, not square, larger and longer."""
    yield from (Size(batch=4), Size(batch=1), other_size(name), Size(height=24, width=24, frames=1, text=33))


@torch.no_grad()
def test_captured_at_one_size_and_exact_at_all(case) -> None:
    for seed, size in enumerate(sizes(case.name)):
        sample = example_inputs(case.model, size, seed=seed)
        expected = case.model(**sample, return_dict=False)[0]
        found = case.graph(**sample)[0]
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), size


@pytest.mark.parametrize("name", ["CogVideoX, rotary", "FLUX.1"])
@torch.no_grad()
def test_captured_with_one_image_whatever_a_batch_shares(name) -> None:
    model = family(name).model
    graph = capture(model, example_inputs(model, Size(batch=1)))
    sample = example_inputs(model, other_size(name))
    assert torch.equal(graph(**sample)[0], model(**sample, return_dict=False)[0])


@torch.no_grad()
def test_quantized_at_one_size_and_close_at_all(case) -> None:
    for seed, size in enumerate(sizes(case.name)):
        sample = example_inputs(case.model, size, seed=seed)
        expected = case.model(**sample, return_dict=False)[0]
        found = case.quantized(**sample).sample
        assert 0 < relative(found, expected) < 0.35, size


@torch.no_grad()
def test_exported_at_one_size_and_the_same_at_all(case, tmp_path) -> None:
    exported_transformer.save_program(case.quantized, tmp_path / "model.pt2")
    program = exported_transformer.load(tmp_path / "model.pt2")
    for seed, size in enumerate(sizes(case.name)):
        sample = example_inputs(case.model, size, seed=seed)
        assert torch.equal(program(**sample)[0], case.quantized(**sample).sample), size


@torch.no_grad()
def test_whole_numbers_of_a_package_vary(tmp_path) -> None:
    """The frames, height and width of LTX-Video."""
    ltx = family("LTX-Video")
    exported_transformer.save_package(ltx.quantized, tmp_path / "model.pt2")
    package = exported_transformer.load(tmp_path / "model.pt2")
    compiled = copy.copy(ltx.quantized).compile_graph()
    for seed, size in enumerate((Size(), other_size(ltx.name))):
        sample = example_inputs(ltx.model, size, seed=seed)
        assert torch.equal(package(**sample)[0], compiled(**sample).sample), size
    with pytest.raises(ValueError, match=r"height 11 .* do not fit: hidden_states.shape\[1\] == .*\bheight\b"):
        package(**sample | {"height": 11})
    with pytest.raises(ValueError, match="num_frames must be a whole number, found None"):
        package(**{name: x for name, x in sample.items() if name != "num_frames"})


def test_every_linear_in_the_blocks_is_quantized_and_none_outside(case) -> None:
    rows = {row.name: row for row in case.quantized.summary() if row.kind == "linear"}
    inside = {name for name in rows if any(part.isdigit() for part in name.split(".")[:2])}
    kept = {name for name in inside if not rows[name].quantized}
    assert all(".norm1.emb." in name for name in kept)  # DiT embeds time and class in every block
    assert not any(rows[name].quantized for name in rows.keys() - inside)
    assert len(inside - kept) >= 6


@torch.no_grad()
def test_saved_and_loaded_it_draws_the_same(case, tmp_path) -> None:
    case.quantized.save_pretrained(tmp_path / "model")
    loaded = QuantizedTransformer.from_pretrained(tmp_path / "model")
    sample = example_inputs(case.model, other_size(case.name), seed=3)
    assert torch.equal(loaded(**sample).sample, case.quantized(**sample).sample)
    assert [asdict(row) for row in loaded.summary()] == [asdict(row) for row in case.quantized.summary()]
    # a file's tensors start anywhere, and a product's last bit depends on where
    parts = [
        part
        for name, x in graph_tensors.state_of(loaded.graph).items()
        for part in graph_tensors.flatten(name, x).values()
    ]
    assert all(part.data_ptr() % 64 == 0 for part in parts)


# --- rounding, compilation -------------------------------------------------------------------------------------------


def test_rounding_is_learned_in_any_family(case) -> None:
    """Weights alone, where it must gain; with inputs quantized, too, these may be all that is left of a small block's error."""
    model = case.model
    data = [example_inputs(model, Size(height=8, width=8, frames=2), seed=seed) for seed in range(6)]
    everything = recipe_for(model, "w4a6")
    alone = replace(everything, activation=None, attention=None)
    for recipe, iters in ((alone, 100), (everything, 8)):
        prepared = prepare_pt2e(copy.deepcopy(case.graph), quantizer_for(model, recipe))
        report = reconstruct(prepared, data, AdaRoundConfig(iters=iters, batch_size=4), progress=False)
        assert all(row.loss_after <= row.loss_before for row in report.rows)
        assert recipe is everything or any(row.loss_after < row.loss_before for row in report.rows)
    with torch.no_grad():
        graph = lower(convert_pt2e(prepared))
        sample = example_inputs(model, other_size(case.name), seed=7)
        assert relative(graph(**sample)[0], model(**sample, return_dict=False)[0]) < 0.35


MASKED = {
    "encoder_attention_mask": "encoder_hidden_states",
    "text_embedding_mask": "encoder_hidden_states",
    "text_embedding_mask_t5": None,
}
"""Masks among the arguments of any family, and the texts that they hide; Hunyuan-DiT pools all of T5's text, padding too."""

TRACED = {
    "AuraFlow": "SD3, FLUX.1 and Lumina 2",
    "PixArt-α": "PixArt-Σ",
    "CogVideoX": "CogVideoX, rotary",
    "Wan": "Wan, image to video",
}
"""Models that Inductor generates no code for here, which takes half a minute each, and those whose blocks compute the same."""


@torch.no_grad()
def test_compiled_once_and_close_at_all_sizes(case, monkeypatch) -> None:
    """Inductor sums in another order, so that some activations round to the other side: close to the graph, not equal."""
    graph, model = case.quantized.graph, case.model
    if case.name in TRACED:  # Dynamo, AOTAutograd and Inductor's decompositions; then operator by operator
        traced = functools.partial(torch.compile, backend="aot_eager_decomp_partition")
        monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = compile_graph(graph)
    other = other_size(case.name)
    for seed, size in enumerate(
        (Size(), other, replace(other, batch=4, height=other.width, width=other.height, text=33))
    ):
        sample = example_inputs(model, size, seed=seed)
        for mask in sample.keys() & MASKED.keys():  # guidance: a prompt that fills its text, and one that is padded
            sample[mask][0], sample[mask][-1] = 1, torch.arange(sample[mask].shape[1]) < 4
        expected = model(**sample, return_dict=False)[0]
        uncompiled = graph(**sample)[0]
        found = compiled(**sample)[0]
        error = relative(uncompiled, expected)
        assert 0 < error < 0.35
        assert relative(found, uncompiled) < error / 5
        assert relative(found, expected) < 1.1 * error
        for mask in sample.keys() & MASKED.keys():
            if text := MASKED[mask]:
                sample[text][sample[mask] == 0] += 100
        assert torch.equal(compiled(**sample)[0], found), "what a mask hides matters"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PixArt-Σ", "Sana", "LTX-Video", "Lumina 2"])
@torch.no_grad()
def test_a_row_whose_mask_is_empty(name) -> None:
    """Guidance with an empty prompt."""
    model, graph = family(name).model, family(name).graph
    sample = example_inputs(model, Size(batch=3), seed=2)
    sample["encoder_attention_mask"][1] = 0
    expected = model(**sample, return_dict=False)[0]
    assert expected.isfinite().all()
    assert torch.allclose(graph(**sample)[0], expected, atol=1e-5)
    assert relative(family(name).quantized(**sample).sample, expected) < 0.35


@torch.no_grad()
def test_what_a_mask_hides_does_not_matter() -> None:
    model, graph = family("Lumina 2").model, family("Lumina 2").graph
    sample = example_inputs(model, Size(batch=2, text=9), seed=2)
    sample["encoder_attention_mask"][:] = torch.tensor([[1] * 4 + [0] * 5, [1] * 9])
    before = graph(**sample)[0]
    sample["encoder_hidden_states"][0, 4:] = 100.0
    assert torch.equal(graph(**sample)[0], before)


# --- recipes ---------------------------------------------------------------------------------------------------------


def formats(name: str, recipe: str = "w4a6") -> dict[str, tuple[str | None, str | None]]:
    """(weight, activation) of every quantized linear."""
    quantizer = quantizer_for(family(name).model, recipe)
    prepare_pt2e(copy.deepcopy(family(name).graph), quantizer)
    linears = (d for d in quantizer.decisions.values() if d.kind == "linear" and d.config)
    return {d.name: (d.config.weight, d.config.activation) for d in linears}


def test_the_papers_recipe_for_each_of_its_models() -> None:
    for name, weight in (("PixArt-α", "e2m1"), ("PixArt-Σ", "e1m2"), ("Hunyuan-DiT", "e2m1")):
        found = formats(name)
        before_gelu = {layer for layer in found if layer.endswith("net.0.proj")}
        assert {found[layer] for layer in before_gelu} == {("e3m0", "e2m3")}
        assert {found[layer] for layer in found.keys() - before_gelu} == {(weight, "e2m3")}


def test_a_recipe_that_names_its_formats_has_them_in_every_family() -> None:
    model = small_model("PixArt-Σ")
    assert recipe_for(model, "w4a6").weight == recipe_for(model, "w4a8").weight == "e1m2"
    for name in ("w4a6_e2m1", "int_w4a6"):
        assert recipe_for(model, name).weight == RECIPES[name]().weight
    own = QuantConfig(weight="int4")
    assert recipe_for(model, own) is own


def test_one_vector_an_image_keeps_eight_bits() -> None:
    found = formats("SD3")
    modulations = {layer for layer in found if layer.endswith((".norm1.linear", ".norm1_context.linear"))}
    assert len(modulations) == 4
    assert {found[layer][1] for layer in modulations} == {"int8"}


@torch.no_grad()
def test_hunyuans_long_skips_have_scales_for_each_half() -> None:
    model, quantized = family("Hunyuan-DiT").model, family("Hunyuan-DiT").quantized
    parts = [row for row in quantized.summary() if ".skip_linear" in row.name]
    assert [row.name for row in parts] == ["blocks.3.skip_linear.part0", "blocks.3.skip_linear.part1"]
    assert all(row.quantized and row.shape == (128, 128) for row in parts)
    whole = model.blocks[3].skip_linear.weight
    joined = torch.cat([quantized.graph.get_parameter(f"{row.name}.weight").dequantize() for row in parts], 1)
    assert relative(joined, whole) < 0.2


@torch.no_grad()
def test_converting_frees_the_float_weights() -> None:
    graph = copy.deepcopy(family("PixArt-Σ").graph)
    floats = sum(p.numel() for p in graph.parameters())
    quantizer = quantizer_for(family("PixArt-Σ").model, "w4a6")
    converted = convert_pt2e(prepare_pt2e(graph, quantizer), fold_quantize=False)
    left = sum(p.numel() for p in converted.parameters())
    codes = sum(b.numel() for name, b in converted.named_buffers() if name.endswith("_codes"))
    assert left == floats - codes


def test_a_user_may_still_skip_a_linear_that_would_be_split() -> None:
    quantizer = quantizer_for(family("Hunyuan-DiT").model).set_module_name("*.skip_linear", None)
    prepare_pt2e(copy.deepcopy(family("Hunyuan-DiT").graph), quantizer)
    decision = quantizer.decisions["blocks.3.skip_linear"]
    assert decision.config is None
    assert "name matches" in decision.reason


def test_groups_that_do_not_divide_are_as_large_as_they_can_be() -> None:
    rows = {row.name: row for row in family("Sana").quantized.summary()}
    assert rows["transformer_blocks.0.attn1.to_q"].reason.endswith("groups of 112")
    convolutions = [row for row in rows.values() if row.kind == "convolution"]
    assert [row.name for row in convolutions] == [
        "patch_embed.proj",
        *(f"transformer_blocks.0.ff.conv_{part}" for part in ("inverted", "depth", "point")),
    ]
    assert not any(row.quantized for row in convolutions)
    # linear attention: two products of tensors, and no softmax
    assert not rows["transformer_blocks.0.attn1"].quantized
    assert rows["transformer_blocks.0.attn2"].quantized


def test_a_class_conditional_pipeline_calibrates_on_its_labels(tmp_path) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    autoencoder = AutoencoderKL(latent_channels=4, sample_size=16, norm_num_groups=8, block_out_channels=(8,))
    pipe = DiTPipeline(family("DiT").model, autoencoder.eval(), DDIMScheduler())
    quantized = quantize_pipeline(
        pipe, "w4a6", class_labels=[1, 2, 3], steps=2, samples=4, batch_size=2, adaround=AdaRoundConfig(iters=2),
        progress=False,
    )  # fmt: skip
    quantized.save_pretrained(tmp_path / "dit")
    loaded = load_pipeline(tmp_path / "dit")

    def draw(some: DiTPipeline) -> torch.Tensor:
        some.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = some(class_labels=[5, 7], num_inference_steps=2, output_type="np", generator=generator).images
        return torch.from_numpy(images)

    assert draw(loaded).shape == (2, 16, 16, 3)
    assert torch.equal(draw(loaded), draw(quantized))
    assert not torch.equal(draw(loaded), draw(pipe))


# --- models that are not in the table --------------------------------------------------------------------------------


@torch.no_grad()
def test_an_unknown_model_gets_safe_defaults_and_is_told() -> None:
    model, sample = TinyDiT(width=96), tiny_sample(width=96)
    with pytest.warns(UserWarning, match=r"TinyDiT is no family .* leaving 2 linears .*\(pos_embedder, proj_out\)"):
        quantizer = quantizer_for(model, "w4a6")
    graph = lower(convert_pt2e(prepare_pt2e(capture(model, sample), quantizer)))
    quantized = {d.name: d.config for d in quantizer.decisions.values() if d.kind == "linear" and d.config}
    assert len(quantized) == 6
    assert {(config.weight, config.group_size) for config in quantized.values()} == {("e2m1", 96)}
    assert relative(graph(**sample)[0], model(**sample)[0]) < 0.35
    with pytest.raises(ValueError, match=r"TinyDiT is no family .* collect_samples"):
        example_inputs(model)


@torch.no_grad()
def test_an_unknown_model_of_diffusers_goes_through_the_whole_flow() -> None:
    from diffusers import CogView3PlusTransformer2DModel

    torch.manual_seed(0)
    model = CogView3PlusTransformer2DModel(
        num_attention_heads=2, attention_head_dim=64, num_layers=1, text_embed_dim=96, time_embed_dim=64, condition_dim=32,
        sample_size=16, pos_embed_max_size=16,
    ).eval()  # fmt: skip
    sample = {
        "hidden_states": torch.randn(2, 16, 16, 16), "encoder_hidden_states": torch.randn(2, 8, 96),
        "timestep": torch.tensor([5, 5]), "original_size": torch.full((2, 2), 128.0),
        "target_size": torch.full((2, 2), 128.0), "crop_coords": torch.zeros(2, 2),
    }  # fmt: skip
    with pytest.warns(UserWarning, match="CogView3PlusTransformer2DModel is no family"):
        quantizer = quantizer_for(model)
    graph = lower(convert_pt2e(prepare_pt2e(capture(model, sample), quantizer)))
    assert relative(graph(**sample)[0], model(**sample, return_dict=False)[0]) < 0.35
    kept = {d.name for d in quantizer.decisions.values() if d.kind == "linear" and d.config is None}
    assert not any(name.startswith("transformer_blocks.") for name in kept)


# --- numbers, names, the command -------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_number_that_was_captured_may_vary_and_a_constant_may_not() -> None:
    model, quantized = family("LTX-Video").model, family("LTX-Video").quantized
    sample = example_inputs(model, Size(height=8, width=24, frames=2))
    assert quantized(**sample).sample.shape == sample["hidden_states"].shape
    with pytest.raises(ValueError, match=r"height .* found 2\.5"):
        quantized(**(sample | {"height": 2.5}))
    with pytest.raises(ValueError, match="rope_interpolation_scale"):
        quantized(**(sample | {"rope_interpolation_scale": (1.0, 32, 32)}))


def test_each_row_of_the_table_has_a_case() -> None:
    assert {family_of(small_model(name)).name for name in SMALL} == {family.name for family in FAMILIES}


def test_sigma_is_told_from_alpha_by_what_its_config_names() -> None:
    from diffusers import PixArtTransformer2DModel

    def family(**config: object) -> str:
        with torch.device("meta"):
            model = PixArtTransformer2DModel(num_layers=1, caption_channels=64, **config)
        return family_of(model).name

    # as published: 1024 and 512 px, then Σ of every size
    assert family(sample_size=128) == family(sample_size=64) == "PixArt-α"
    for size, scale in ((32, 0.5), (64, 1), (128, 2), (256, 4)):
        assert family(sample_size=size, interpolation_scale=scale, use_additional_conditions=False) == "PixArt-Σ"


def test_a_pixart_that_projects_no_captions_gets_text_as_wide_as_its_keys() -> None:
    from diffusers import PixArtTransformer2DModel

    with torch.device("meta"):
        model = PixArtTransformer2DModel(num_layers=1, cross_attention_dim=96)
    assert example_inputs(model)["encoder_hidden_states"].shape[-1] == 96


def cells(markdown: str) -> dict[str, list[str]]:
    """The rows of the first table in a text, by their first cell; the head is a row, too."""
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return {cell[0]: cell[1:] for line in lines for cell in [[cell.strip() for cell in line.split("|")[1:-1]]]}


def test_the_docs_say_what_the_table_says() -> None:
    """Of layers, formats and reasons, word by word; errors to their last digits, which differ from machine to machine."""
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    said = cells(page[page.index("| family ") :].partition("\n\n")[0])
    rows = cells(table({name: row_of(name, f.model, f.graph, f.quantized) for name in SMALL for f in [family(name)]}))
    assert list(said) == list(rows) == ["family", *SMALL]
    assert said["family"] == rows["family"]
    assert {name: row[:5] for name, row in said.items()} == {name: row[:5] for name, row in rows.items()}
    for name in SMALL:
        assert float(rows[name][5]) <= 1e-5 and float(said[name][5]) <= 1e-5
        assert float(rows[name][6]) == pytest.approx(float(said[name][6]), rel=0.25, abs=0.01)
    assert "4 convolutions" in rows["Sana"][4] and "linear attention" in rows["Sana"][4]
    assert rows["PixArt-Σ"][:3] == ["20 of 26", "e1m2 18, e3m0 2", "4 of 4"]


def test_the_command_prints_the_tables(tmp_path, capsys, monkeypatch) -> None:
    """Of all families and classes, which are two here; others are measured by the tests above, and test_every_transformer."""
    monkeypatch.setattr(families, "SMALL", {"DiT": SMALL["DiT"]})
    monkeypatch.setattr(families, "transformer_classes", lambda: ["DiTTransformer2DModel", "PriorTransformer"])
    main(compile=True, out=tmp_path)
    said = capsys.readouterr().out
    printed = cells(said)
    assert "Module form: 2 of 2 classes." in said
    row = dict(zip(printed["family"], printed["DiT"], strict=True))
    assert 0 < float(row["error"]) < 0.35
    assert float(row["error, compiled"]) == pytest.approx(float(row["error"]), abs=0.02)
    assert 0 <= float(row["compiled vs not"]) < 0.05
    assert float(row["compile, s"]) > 0
    assert printed["DiTTransformer2DModel"][0] == printed["DiTTransformer2DModel"][2] == "7 of 11"
    assert printed["PriorTransformer"][2] == "untried"
    written = json.loads((tmp_path / "families.json").read_text())
    stored = written["families"]["DiT"]
    assert stored["compiled"]["error"] < 0.35 and len(stored["layers"]) == 13
    assert written["transformers"]["PriorTransformer"]["modules"]["failed"] is None


def test_a_family_that_fails_has_a_row_and_the_others_theirs(tmp_path, capsys, monkeypatch) -> None:
    def captured(model, sample):
        if "Sana" in type(model).__name__:
            raise RuntimeError("no graph\nof this")
        return family("DiT").graph

    def compile_graph(self):
        raise NotImplementedError("no compiler")

    monkeypatch.setattr(families, "capture", captured)
    monkeypatch.setattr(QuantizedTransformer, "compile_graph", compile_graph)
    with pytest.raises(typer.Exit) as ended:
        main(names="Sana; DiT", compile=True, out=tmp_path)
    assert ended.value.exit_code == 1
    said = capsys.readouterr().out
    rows = {name: dict(zip(cells(said)["family"], cells(said)[name], strict=True)) for name in ("Sana", "DiT")}
    assert rows["Sana"]["linears"] == rows["Sana"]["capture, s"] == "failed"
    assert "Sana failed: capture: RuntimeError: no graph\n" in said
    assert rows["DiT"]["linears"] == "7 of 11" and rows["DiT"]["error, compiled"] == "failed"
    assert "DiT failed: compile: NotImplementedError: no compiler\n" in said
    assert set(json.loads((tmp_path / "families.json").read_text())["families"]) == {"Sana", "DiT"}


def test_the_command_refuses_what_it_does_not_know(tmp_path) -> None:
    with pytest.raises(typer.BadParameter, match="no family Dit; choose from PixArt-α; "):
        main(names="DiT; Dit", out=tmp_path)
    with pytest.raises(ValueError, match="unknown recipe 'w3a3'"):
        main(names="DiT", recipe="w3a3", out=tmp_path)
    assert not list(tmp_path.iterdir())
