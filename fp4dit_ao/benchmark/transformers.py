"""Workloads: one denoising step of a model of PixArt-XL's shape, and a whole generation of a pipeline.

Models are loaded from files as a user would load them, so that the memory peak of loading is measured, too.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao import _compat
from fp4dit_ao._compat import pytree
from fp4dit_ao.benchmark import exact, memory
from fp4dit_ao.benchmark.peers import PEERS, quantizable
from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.benchmark.worker import Facts, Workload, timed
from fp4dit_ao.calibration import calibrate
from fp4dit_ao.calibration.pipeline_arguments import call_arguments
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.diffusers_integration import named_models
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.diffusers_integration.pipeline_folder import load_pipeline
from fp4dit_ao.diffusers_integration.pipeline_quantization import quantize_pipeline
from fp4dit_ao.families import quantizer_for, recipe_for
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind, capture
from fp4dit_ao.passes.lowering import lower
from fp4dit_ao.schemes import scheme_of

if TYPE_CHECKING:
    from diffusers import PixArtTransformer2DModel

TEXT_TOKENS = 300
"""Text tokens of a prompt, as in PixArt-Σ."""
PIXART_XL: dict[str, int] = {
    "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 4096,
    "in_channels": 4, "out_channels": 8, "patch_size": 2, "use_additional_conditions": False,
}  # fmt: skip
"""Config of PixArt-XL/2 without its depth; 611 M parameters with 28 layers."""
FLOAT = "float"
"""Folder of the float model, beside those of the recipes."""


def sample(pixels: int, dtype: torch.dtype, config: Mapping[str, int] = PIXART_XL) -> dict[str, object]:
    """Keyword arguments of ``forward`` in one step with guidance, batch 2."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, config["in_channels"], pixels // 8, pixels // 8)
    return {
        "hidden_states": torch.randn(shape, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, config["caption_channels"], generator=generator).to(dtype),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def random_model(config: Mapping[str, int], pixels: int, dtype: torch.dtype) -> "PixArtTransformer2DModel":
    """PixArt transformer with normally distributed parameters of deviation 0.02, as after initialisation."""
    from diffusers import PixArtTransformer2DModel

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # avoids a float32 copy
    try:
        model = PixArtTransformer2DModel(sample_size=pixels // 8, **config)
    finally:
        torch.set_default_dtype(before)
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False)


# --- files -----------------------------------------------------------------------------------------------------------


class StepFiles(Workload):
    """Writes the models of :class:`Step`: the float one, and one per recipe."""

    def __init__(self, folder: str, config: Mapping[str, int], pixels: int, recipes: list[str]):
        self.folder, self.config, self.pixels, self.recipes = Path(folder), config, pixels, recipes

    @torch.no_grad()
    def prepare(self, **case: object) -> Facts:
        model = random_model(self.config, self.pixels, torch.bfloat16)
        model.save_pretrained(self.folder / FLOAT)
        given = sample(self.pixels, torch.bfloat16, self.config)
        for recipe in self.recipes:
            quantized(model, given, recipe).save_pretrained(self.folder / recipe)
        return {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def quantized(model: nn.Module, given: Mapping[str, object], recipe: str) -> QuantizedTransformer:
    """Quantizes ``model`` with nearest rounding; the cost of a step does not depend on how weights were rounded.

    Args:
        model: the float model.
        given: keyword arguments of one ``forward``.
        recipe: name of the recipe.
    """
    config = recipe_for(model, recipe)
    quantizer = quantizer_for(model, recipe)
    prepared = prepare_pt2e(capture(model, given), quantizer)
    if config.weights_need_data or not scheme_of(config).quantizes_online(config):
        calibrate(prepared, [given], progress=False)
    graph = lower(convert_pt2e(prepared))
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), graph)
    return QuantizedTransformer(graph, model, sample_description.describe(bind(model, given)), decisions, config)


class GenerationFiles(Workload):
    """Writes the pipeline ``model``, quantized, into one folder per recipe."""

    def __init__(
        self, folder: str, model: str, prompts: list[str], recipes: list[str], device: str, call: Mapping[str, Any]
    ):
        self.folder, self.model, self.prompts, self.recipes = Path(folder), model, prompts, recipes
        self.device, self.call = device, call

    def prepare(self, **case: object) -> Facts:
        pipe = named_models.open_pipeline(self.model, self.device).to(torch.bfloat16)
        for recipe in self.recipes:
            options = {"rounding": "nearest", "samples": 8, "progress": False, **self.call}
            quantize_pipeline(pipe, recipe, prompts=self.prompts, **options).save_pretrained(self.folder / recipe)
        return {"parameters": sum(parameter.numel() for parameter in pipe.transformer.parameters())}


# --- models ----------------------------------------------------------------------------------------------------------


def ready(model: nn.Module, variant: Variant) -> tuple[Callable[..., Sequence[Tensor]], Facts]:
    """Converts and compiles ``model``, which is on its device, for ``variant``; returns it and the bytes of its
    weights.

    Args:
        model: a float model, or a ``QuantizedTransformer`` if the variant is a recipe.
        variant: decides the conversion and the mode.
    """
    shapes: dict[str, tuple[int, ...]]
    stored: nn.Module
    run: Callable[..., Sequence[Tensor]]
    if isinstance(model, QuantizedTransformer):
        rows = [row for row in model.summary() if row.kind == "linear" and row.quantized]
        shapes = {row.name: row.shape for row in rows if row.shape is not None}
        stored, run = model.graph, model
        if variant.mode == "compiled":
            model.compile_graph()
        elif variant.mode == "by block":
            model.compile_blocks()
    else:
        names = quantizable(model)
        linears = {name: model.get_submodule(name) for name in names}
        shapes = {name: tuple(linear.weight.shape) for name, linear in linears.items() if isinstance(linear, nn.Linear)}
        if variant.is_peer:
            model = PEERS[variant.method].convert(model, names)
        stored = run = model
        if variant.mode == "by block":
            for block in repeated_blocks(model):
                block.compile()
    facts = {"bytes": memory.weight_bytes(stored), "bits": memory.bits_per_weight(stored, shapes)}
    if variant.mode == "compiled" and not variant.is_recipe:
        # after the facts, since the state_dict of a compiled module has other names
        run = torch.compile(model)
    return run, facts


def repeated_blocks(model: nn.Module) -> Sequence[nn.Module]:
    """Blocks that regional compilation compiles once a class: those that diffusers names, else the longest list of modules of
    one class."""
    named = _compat.repeated_block_names(model)
    if blocks := [module for module in model.modules() if type(module).__name__ in named]:
        return blocks
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len({type(block) for block in m}) == 1]
    return max(([*blocks] for blocks in lists), key=len, default=[])


class _Model(Workload):
    """Base of both workloads: loads (measuring the peak), converts, compiles, calls once, and compares with float32."""

    def __init__(self, method: str, mode: str, device: str, threads: int, reference: str):
        torch.set_num_threads(threads)
        import diffusers  # noqa: F401, imported before memory is measured
        import torchao.quantization  # noqa: F401

        self.variant = Variant(method, mode)  # type: ignore[arg-type]
        self.device, self.reference = device, Path(reference)
        self.dtype: torch.dtype = getattr(torch, self.variant.dtype)
        self.output = torch.empty(0)

    def load(self, **case: Any) -> Facts:
        """Loads and prepares the model of :meth:`run`; returns facts."""
        raise NotImplementedError

    @torch.no_grad()
    def prepare(self, **case: object) -> Facts:
        """Loads the model, unless a former call did; returns facts.

        They are bytes, bits, error, ``load bytes`` and ``first`` (seconds of the first call, compilation included).
        """
        if self.output.numel():
            return {}
        before = memory.reset_peak()
        facts = self.load(**case)
        facts["load bytes"] = memory.peak() - before
        facts["first"] = timed(self)
        if self.variant.method == "float32" and not self.reference.exists():
            save_file({"output": self.output.cpu().contiguous()}, self.reference)
        if self.reference.exists():
            facts["error"] = exact.relative_error(self.output.cpu(), load_file(self.reference)["output"])
        if self.variant.is_peer:
            self.run()  # some compile again in their second call
        memory.reset_peak()
        self.before = before
        return facts

    def finish(self) -> Facts:
        return {"run bytes": memory.peak() - self.before}


class Step(_Model):
    """One denoising step. The float32 variant writes its output to the file ``reference``, which the others compare
    with."""

    def __init__(self, *, folder: str, config: Mapping[str, int], **options: Any):
        super().__init__(**options)
        self.folder, self.config = Path(folder), config

    def load(self, **case: Any) -> Facts:
        from diffusers import PixArtTransformer2DModel

        cls, name = (
            (QuantizedTransformer, self.variant.method) if self.variant.is_recipe else (PixArtTransformer2DModel, FLOAT)
        )
        model = cls.from_pretrained(self.folder / name, torch_dtype=self.dtype).to(self.device)
        self.model, facts = ready(model.eval().requires_grad_(False), self.variant)
        given = sample(case["pixels"], self.dtype, self.config)
        self.given = pytree.tree_map_only(Tensor, lambda x: x.to(self.device), given)
        return facts

    @torch.no_grad()
    def run(self) -> None:
        self.output = self.model(**self.given)[0]


class Generation(_Model):
    """Generation of one batch of images. The error is that of the decoded images, before rounding to bytes."""

    def __init__(self, *, folder: str, model: str, prompts: list[str], call: Mapping[str, Any], **options: Any):
        super().__init__(**options)
        self.folder, self.name, self.prompts, self.call = Path(folder), model, prompts, call

    def load(self, **case: object) -> Facts:
        if self.variant.is_recipe:
            pipe = load_pipeline(self.folder / self.variant.method, device=self.device)
        else:
            pipe = named_models.open_pipeline(self.name, self.device).to(self.dtype)
        transformer, facts = ready(pipe.transformer.eval().requires_grad_(False), self.variant)
        object.__setattr__(
            pipe, "transformer", transformer
        )  # a compiled module is not of the class that the pipeline names
        pipe.set_progress_bar_config(disable=True)
        self.pipe, self.arguments = pipe, call_arguments(pipe, **self.call)
        return facts

    def run(self) -> None:
        generators = [torch.Generator().manual_seed(index) for index in range(len(self.prompts))]
        self.output = self.pipe(self.prompts, generator=generators, output_type="pt", **self.arguments).images
