"""Calls that people make of any pipeline of diffusers, made of quantized ones."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from diffusers.quantizers import PipelineQuantizationConfig
from safetensors.torch import save_file, save_model
from torch import nn
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import (
    QuantConfig,
    QuantizedTransformer,
    capture,
    example_inputs,
    quantize_modules,
    quantize_pipeline,
    quantizer_for,
)
from fp4dit_ao.checkpoint import transformer_folder
from fp4dit_ao.diffusers_integration.component_types import stand_ins
from fp4dit_ao.diffusers_integration.folders_and_devices import one_device
from tests.tiny import CALL, tiny_pipeline

CPU = torch.device("cpu")


def draw(pipe: Any, **call: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    seeded = {"generator": torch.Generator().manual_seed(1), "output_type": "latent"}
    image: torch.Tensor = pipe("a red cat", **CALL | seeded | call).images
    return image


def with_transformer(pipe: Any, transformer: Any) -> Any:
    new = copy.copy(pipe)
    new.transformer = transformer
    return new


def in_form(form: str, pipe: Any) -> Any:
    """A transformer of the test's own."""
    own = copy.deepcopy(pipe.transformer)
    return own.to_modules() if form == "module" else own


@pytest.fixture(scope="module")
def saved(tiny_quantized: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "pipe"
    tiny_quantized.save_pretrained(folder)
    return folder


# --- pipelines made of another one -----------------------------------------------------------------------------------


def test_a_graph_goes_on_in_a_pipeline_made_from_its_pipeline(tiny_quantized: Any) -> None:
    for cls in (PixArtSigmaPipeline, PixArtAlphaPipeline):
        made: Any = cls.from_pipe(tiny_quantized)
        assert made.transformer is tiny_quantized.transformer
    assert torch.equal(draw(PixArtSigmaPipeline.from_pipe(tiny_quantized)), draw(tiny_quantized))


def test_a_graph_of_another_model_does_not(tiny_quantized: Any) -> None:
    assert list(stand_ins(tiny_quantized, {"transformer": (PixArtTransformer2DModel, type(None))})) == ["transformer"]
    for other in ((FluxTransformer2DModel,), (nn.Module,), ()):
        assert stand_ins(tiny_quantized, {"transformer": other}) == {}


def test_another_transformer_may_be_given(tiny_quantized: Any) -> None:
    other = copy.copy(tiny_quantized.transformer)
    assert isinstance(other, QuantizedTransformer)
    assert PixArtSigmaPipeline.from_pipe(tiny_quantized, transformer=other).transformer is other


@pytest.mark.parametrize("cls", [PixArtSigmaPipeline, PixArtAlphaPipeline, AutoPipelineForText2Image])
def test_default_arguments_go_on_in_a_pipeline_made_from_one_that_has_some(cls: Any, tiny_quantized: Any) -> None:
    made = cls.from_pipe(tiny_quantized)
    made.set_progress_bar_config(disable=True)
    image = made("a red cat", generator=torch.Generator().manual_seed(1), output_type="latent").images
    assert torch.equal(image, draw(made))
    assert made.generation_defaults == CALL
    assert made.generation_defaults is not tiny_quantized.generation_defaults


def test_a_pipeline_made_from_one_without_default_arguments_has_none() -> None:
    for cls in (PixArtSigmaPipeline, AutoPipelineForText2Image):
        assert not hasattr(cls.from_pipe(tiny_pipeline(layers=1)), "generation_defaults")


# --- copies ----------------------------------------------------------------------------------------------------------


def through_torch_save(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "through", [copy.copy, copy.deepcopy, through_torch_save, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_of_a_graph(through: Callable[[Any], Any], tiny_quantized: Any) -> None:
    copied = through(tiny_quantized.transformer)
    assert isinstance(copied, QuantizedTransformer)
    assert copied is not tiny_quantized.transformer
    assert repr(copied) == repr(tiny_quantized.transformer)
    assert torch.equal(draw(with_transformer(tiny_quantized, copied)), draw(tiny_quantized))


@pytest.mark.parametrize("form", ["graph", "module"])
def test_weights_move_into_shared_memory(form: str, tiny_quantized: Any) -> None:
    """What ``torch.multiprocessing`` does before it sends a model; it was a segmentation fault."""
    model = in_form(form, tiny_quantized).share_memory()
    assert all(p.is_shared() for p in model.parameters())
    assert not all(p.is_shared() for p in tiny_quantized.transformer.parameters())
    assert torch.equal(draw(with_transformer(tiny_quantized, model)), draw(tiny_quantized))


def test_the_graph_of_a_transformer_may_be_replaced(tiny_quantized: Any) -> None:
    own = copy.deepcopy(tiny_quantized.transformer)
    other = copy.deepcopy(own.graph)
    for parameter in other.parameters():
        if not isinstance(parameter, TorchAOBaseTensor):
            parameter.data.zero_()
    own.graph = other
    assert own.graph is other
    assert not torch.equal(draw(with_transformer(tiny_quantized, own)), draw(tiny_quantized))


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["graph", "module"])
@torch.no_grad()
def test_torch_exports_a_transformer_as_any_other(form: str, tiny_quantized: Any, tmp_path: Path) -> None:
    """With the arguments that a pipeline gives it; the program may be run, saved and loaded."""
    model, calls = in_form(form, tiny_quantized), []
    model.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    draw(with_transformer(tiny_quantized, model))
    args, kwargs = calls[0]
    program = torch.export.export(model, args, kwargs)
    torch.export.save(program, tmp_path / "transformer.pt2")
    expected = model(*args, **kwargs)[0]
    for some in (program, torch.export.load(tmp_path / "transformer.pt2")):
        assert torch.equal(some.module()(*args, **kwargs)[0], expected)


# --- what cannot be saved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["graph", "module"])
def test_float_weights_that_took_the_place_of_codes_are_not_saved(
    form: str, tiny_quantized: Any, tmp_path: Path
) -> None:
    model, state = in_form(form, tiny_quantized), tiny_pipeline(layers=1).transformer.state_dict()
    if form == "graph":
        state = {f"lowered.{name}": x for name, x in state.items()}
    model.load_state_dict(state, strict=False, assign=True)
    with pytest.raises(
        ValueError, match=r"attn1.to_q was quantized to e2m1, and its weight is torch.float32 now.*float model"
    ):
        model.save_pretrained(tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("form", ["graph", "module"])
def test_offloaded_weights_are_not_saved(form: str, tiny_quantized: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is on the meta device.*call pipe.remove_all_hooks\(\)"):
        in_form(form, tiny_quantized).to("meta").save_pretrained(tmp_path / "away")


def test_safetensors_own_functions_are_refused_with_the_call_that_works(tiny_quantized: Any, tmp_path: Path) -> None:
    state = {name: x for name, x in tiny_quantized.transformer.state_dict().items() if hasattr(x, "qdata")}
    with pytest.raises(ValueError, match=r"a MinifloatTensor has no storage of its own.*save_pretrained\(folder\)"):
        save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no storage of its own.*save_pretrained\(folder\)"):
        save_model(in_form("module", tiny_quantized), str(tmp_path / "x.safetensors"))


# --- what only modules can do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["transformer_blocks", "pos_embed", "attn_processors", "set_attn_processor"])
def test_a_graph_says_where_the_models_own_modules_and_methods_are(name: str, tiny_quantized: Any) -> None:
    assert not hasattr(tiny_quantized.transformer, name)
    with pytest.raises(AttributeError, match=rf"has no {name}, which is of the modules of PixArt.*to_modules\(\)"):
        getattr(tiny_quantized.transformer, name)
    with pytest.raises(AttributeError, match="object has no attribute 'nonsense'"):
        tiny_quantized.transformer.nonsense  # noqa: B018


@pytest.mark.parametrize(
    "call",
    [
        lambda model: model.enable_group_offload(onload_device=CPU),
        lambda model: model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn),
        lambda model: model.set_attention_backend("native"),
    ],
)
def test_a_graph_refuses_what_would_do_nothing(call: Callable[[Any], None], tiny_quantized: Any) -> None:
    with pytest.raises(ValueError, match=r"a quantized graph has no \w+, which is of the modules of PixArt"):
        call(tiny_quantized.transformer)


def test_a_graph_offloaded_layer_by_layer_names_the_remedy(tiny_quantized: Any) -> None:
    pipe = with_transformer(tiny_quantized, in_form("graph", tiny_quantized).to("meta"))
    with pytest.raises(ValueError, match=r"cannot be offloaded layer by layer; use pipe.enable_model_cpu_offload\(\)"):
        draw(pipe)


def stored_bits(pipe: Any) -> dict[str, torch.Tensor]:
    tensors = pipe.transformer.tensors_to_save()
    return {name: x.contiguous().flatten().view(torch.uint8) for name, x in tensors.items()}


@pytest.mark.parametrize(
    "recipe", ["w4a6_static", "w4a8_lowbit_fp", "w4a6_codebook", "nvfp4", "mxfp6_e2m3", "w4a4_twin_log"]
)
def test_a_graph_is_cast_whatever_its_scales(recipe: str) -> None:
    """Those of static ranges and of weights stay as they are."""
    quantized = quantize_pipeline(
        tiny_pipeline(layers=1), recipe, prompts=["a cat"], samples=4, rounding="nearest", progress=False, **CALL
    )
    expected, before = draw(quantized), stored_bits(quantized)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        quantized.to(dtype)
        found = draw(quantized)
        assert found.dtype == quantized.transformer.dtype == dtype
        assert (found.float() - expected).norm() <= 0.3 * expected.norm()  # of 4-bit tokens some take another level
    after = stored_bits(quantized)
    fixed = [name for name in before if name.endswith(("scale", "qdata", "index"))]
    assert fixed
    assert all(torch.equal(before[name], after[name]) for name in fixed)


# --- models that are not as they were loaded --------------------------------------------------------------------------


def test_a_compiled_model_is_compiled_after_it_is_quantized() -> None:
    pipe = tiny_pipeline(layers=1)
    sample = example_inputs(pipe.transformer)
    pipe.transformer = model = torch.compile(pipe.transformer)
    steps: list[Callable[[], object]] = [
        lambda: quantize_modules(model),
        lambda: quantize_pipeline(pipe, prompts=["a cat"], **CALL),
        lambda: example_inputs(model),
        lambda: capture(model, sample),
        lambda: quantizer_for(model),
        lambda: quantizer_for(model, QuantConfig.from_name("w4a6")),
    ]
    for step in steps:
        with pytest.raises(ValueError, match="this OptimizedModule is a compiled model: quantize the model"):
            step()


def test_a_quantized_model_is_not_quantized_again(tiny_quantized: Any) -> None:
    for form in ("graph", "module"):
        with pytest.raises(ValueError, match="is already quantized; start from the float model"):
            quantize_modules(in_form(form, tiny_quantized))


def offload_whole(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def offload_groups(pipe: Any) -> None:
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_type="leaf_level")


@pytest.mark.parametrize(("offload", "hook"), [(offload_whole, "CpuOffload"), (offload_groups, "GroupOffloadingHook")])
def test_an_offloaded_pipeline_is_offloaded_after_it_is_quantized(offload: Callable[[Any], None], hook: str) -> None:
    pipe = tiny_pipeline(layers=1)
    expected = draw(pipe)
    offload(pipe)
    with pytest.raises(ValueError, match=rf"the transformer carries hooks \({hook}\).*call pipe.remove_all_hooks\(\)"):
        quantize_pipeline(pipe, rounding="nearest", prompts=["a cat"], progress=False, **CALL)
    assert torch.equal(draw(pipe), expected)


# --- loading ---------------------------------------------------------------------------------------------------------


def test_the_backends_name_quantizes_a_component(tmp_path: Path) -> None:
    tiny_pipeline(layers=1).save_pretrained(tmp_path)
    how = {"quant_backend": "fp4dit_ao", "quant_kwargs": {"recipe": "w4a6"}}
    config = PipelineQuantizationConfig(**how, components_to_quantize=["transformer"])
    pipe = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert pipe.transformer.transformer_blocks[0].attn1.to_q.weight.fmt == "e2m1"
    with pytest.raises(ValueError, match=r"transformers can neither quantize text encoders.*components_to_quantize="):
        DiffusionPipeline.from_pretrained(tmp_path, quantization_config=PipelineQuantizationConfig(**how))


def test_sizes_are_compared_before_a_graph_is_spread_over_devices(saved: Path, tiny_quantized: Any) -> None:
    config = QuantizedTransformer.load_config(saved / "transformer")
    sizes = sum(x.nbytes for x in QuantizedTransformer.from_config(config).buffers())
    assert sizes == sum(
        entry.nbytes for entry in transformer_folder.read_record(saved / "transformer").tensors.values()
    )
    with pytest.raises(ValueError, match="the config"):
        QuantizedTransformer.from_config({})
    pipe = DiffusionPipeline.from_pretrained(saved, device_map="balanced")
    assert torch.equal(draw(pipe), draw(tiny_quantized))


def test_a_graph_goes_to_the_device_of_its_map(saved: Path) -> None:
    loaded = QuantizedTransformer.from_pretrained(saved, subfolder="transformer", device_map="meta")
    assert loaded.device.type == "meta"
    assert one_device({"": "cuda:0"}) == torch.device("cuda:0")
    assert one_device("auto") == (torch.accelerator.current_accelerator(check_available=True) or CPU)
    assert one_device(None) is None
    for several in ({"a": 0, "b": 1}, {"": "disk"}, {}):
        with pytest.raises(ValueError, match="a quantized graph is on one device; give one, such as"):
            one_device(several)


def test_a_graph_is_found_by_the_name_of_its_repository(saved: Path, tmp_path: Path) -> None:
    """Snapshots in the hub's cache are links."""
    root = tmp_path / "models--me--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "snapshots").mkdir()
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots" / ("0" * 40)).symlink_to(saved, target_is_directory=True)
    how: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    loaded = QuantizedTransformer.from_pretrained("me/tiny", subfolder="transformer", **how)
    assert loaded.nbytes() > 0
    with pytest.raises(FileNotFoundError, match="there is no folder me/other, and no such model on the hub"):
        QuantizedTransformer.from_pretrained("me/other", subfolder="transformer", **how)
