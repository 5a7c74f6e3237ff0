"""``quantize_pipeline``: quantizes a diffusers pipeline in one call."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.fx import GraphModule
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import _compat
from fp4dit_ao.calibration import MEMORY_LIMIT, calibrate, collect_samples, pipeline_arguments
from fp4dit_ao.calibration.observation import device_of
from fp4dit_ao.calibration.uncomputed_calls import uncomputed
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.config import DEFAULT_RECIPE, PLANS, AdaRoundConfig, Fields, QuantConfig, ReconstructionConfig
from fp4dit_ao.diffusers_integration.combination_search import (
    HELD_OUT,
    Combination,
    CombinationReport,
    CombinationSearch,
)
from fp4dit_ao.diffusers_integration.float_source import check_source
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.diffusers_integration.pipeline_folder import with_transformers
from fp4dit_ao.diffusers_integration.text_encoders import (
    is_text_encoder,
    quantize_text_encoder,
)
from fp4dit_ao.families import quantizer_for, recipe_for
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind, capture
from fp4dit_ao.graph_capture.transforming import resolve_transforms, transform
from fp4dit_ao.passes.device_placement import quantizing_device
from fp4dit_ao.passes.fine_tuning import FINE_TUNINGS, FineTuneConfig, FineTuneReport, run_fine_tuning
from fp4dit_ao.passes.fingerprint import fingerprint
from fp4dit_ao.passes.mixed_precision import ALLOCATIONS, choose_formats
from fp4dit_ao.passes.model_error import calls_of, outputs_of, total_error
from fp4dit_ao.passes.reconstruction import ROUNDINGS, reconstruct
from fp4dit_ao.passes.reconstruction.choice import chosen_config
from fp4dit_ao.passes.reconstruction.engine import files_for
from fp4dit_ao.passes.reconstruction.report import ReconstructionReport
from fp4dit_ao.passes.streamed_lowering import convert_and_lower
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.quantizer import FP4DiTQuantizer
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.util.byte_sizes import byte_count
from fp4dit_ao.util.mapped_files import MappedFiles
from fp4dit_ao.util.plain_mode import plain_mode

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_NAME = re.compile(r"transformer(_\d+)?")
"""Names of transformers in diffusers' pipelines."""


@plain_mode()
def quantize_pipeline(
    pipe: "DiffusionPipeline",
    recipe: str | QuantConfig = DEFAULT_RECIPE,
    *,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    samples: int | None = 128,
    selection: str = "uniform",
    transforms: Sequence[str | GraphTransform] = (),
    allocation: str = "least_error",
    budget_bits: float | None = None,
    rounding: str | None = None,
    objective: str | None = None,
    scope: str | None = None,
    adaround: AdaRoundConfig | None = None,
    reconstruction: ReconstructionConfig | None = None,
    fine_tuning: str | None = None,
    fine_tune: FineTuneConfig | None = None,
    search_combination: bool = False,
    skip: Sequence[str] = (),
    fields: Fields | None = None,
    layers: Mapping[str, str | QuantConfig | None] | None = None,
    components: Sequence[str] | None = None,
    text_encoder_recipe: str | QuantConfig | None = None,
    seed: int = 0,
    batch_size: int = 1,
    compile: bool = False,
    cache_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT,
    memory: int | str | None = None,
    progress: bool = True,
    **call: object,
) -> "DiffusionPipeline":
    """Quantizes the transformers of a diffusers pipeline: calibrate, round on data, convert and lower in one call.

    Names of methods are those that ``fp4dit_ao.methods()`` lists.

    Args:
        pipe: the float pipeline; it stays usable, and shares every component but the transformers with the result.
        recipe: a name in ``config.RECIPES``, adapted to the model's family; or a config, used unchanged. ``"best"`` and the
            others of ``config.PLANS`` name a recipe with transforms, rounding and fine-tuning, for a number of bits and a
            time, such as ``"best_5bit_10min"``.
        prompts: calibration prompts; see :func:`fp4dit_ao.collect_samples`, also for ``steps``, ``samples``,
            ``selection``, ``batch_size``, ``seed``, ``cache_dir``, ``memory_limit_bytes`` and for text embeddings in place
            of prompts.
        transforms: graph transforms before quantization, by name (``"smoothquant"``, ``"low_rank:rank=8"``) or as objects,
            in order.
        allocation: how layers choose among ``QuantConfig.weight_candidates``.
        budget_bits: largest mean of stored bits per weight that the allocation may spend; None for no limit.
        rounding: how weights are rounded: ``"nearest"`` takes seconds, ``"gptq"`` minutes; ``"adaround"`` learns it as
            ``adaround`` says. ``"gptq"`` by default, and ``"adaround"`` beside an ``objective``, a ``scope`` or
            ``search_combination``.
        objective: what learned rounding minimises; ``"mse"`` by default.
        scope: what is rounded together; ``"block"`` by default.
        adaround: settings of learned rounding; without any, ``"adaround"`` is scale-aware AdaRound, ``AdaRoundConfig()``.
        reconstruction: rounding, objective, scope and their settings in one config, in place of those four.
        fine_tuning: method of fine-tuning after rounding, such as ``"scales"`` or ``"efficientdm"``; None for none.
        fine_tune: settings of fine-tuning; ``passes.fine_tuning.FineTuneConfig()`` if None.
        search_combination: try weight equalization, SmoothQuant, GPTQ and the learned rounding, and bias correction in turn,
            and keep each where the model's output errs less on held-out samples; in place of ``transforms`` and
            ``fine_tuning``. Six models are quantized, one or two of them with the learned rounding.
        skip: globs over module names that stay in high precision, besides the recipe's own; of text encoders, too.
        fields: fields of the recipe's ``QuantConfig`` that take other values, such as ``{"group_size": 64}``.
        layers: recipes or configs of some modules, by globs over their names, such as ``{"*.attn2.*": "w4a8", "*.0.*": None}``;
            None leaves them in high precision.
        components: names of the transformers to quantize; every one if None, such as both of Wan 2.2. Text encoders may be
            named beside them, such as ``["transformer", "text_encoder"]``; they are rounded to nearest.
        text_encoder_recipe: recipe or config of the linears of text encoders, such as ``"w4a8"``; if None, the default recipe's
            weights, with float inputs.
        compile: run the quantized graph under ``torch.compile``.
        checkpoint_dir: folder for the state of reconstruction and fine-tuning, from which a killed run resumes.
        memory: what this process may take beside pages of mapped files, such as ``"8GB"``; None for no limit. The model is
            loaded in the type of its files, so that weights stay in them; what does not fit beside the unit at work, and the
            quantized weights, go into files in ``checkpoint_dir`` that have no name. The bits are the same.
        progress: show progress bars with the time left.
        call: further arguments of the pipeline while calibrating, on top of its ``generation.json``.

    Returns:
        A pipeline of the same class. Its ``transformer`` is a ``QuantizedTransformer`` with ``.summary()``,
        ``.report`` and ``.fine_tuning_report``; its ``save_pretrained(dir)`` writes what :func:`load_pipeline` reads.

    Raises:
        ValueError: the pipeline has no transformer or one that is already quantized, the name of a recipe or method is
            unknown, or the calibration data is bad; too little memory, or with what trains the whole model.
    """
    if isinstance(recipe, str) and recipe in PLANS:
        plan = PLANS[recipe]
        plan.check_alone(recipe, {
            "transforms": list(transforms), "rounding": rounding, "objective": objective, "scope": scope,
            "adaround": adaround, "reconstruction": reconstruction, "fine_tuning": fine_tuning,
            "search_combination": search_combination,
        })  # fmt: skip
        recipe, transforms, fine_tuning = plan.recipe, plan.transforms, plan.fine_tuning
        reconstruction = ReconstructionConfig(plan.rounding)
    if search_combination and (list(transforms) or fine_tuning is not None):
        raise ValueError("search_combination finds transforms and fine-tuning itself; leave out what you gave of them")
    if search_combination and rounding is None and reconstruction is None:
        rounding = "adaround"  # which is tried after GPTQ
    limit = None if memory is None else byte_count(memory)
    trains = "search_combination" if search_combination else fine_tuning
    if limit is not None and trains is not None:
        raise ValueError(
            f"memory={memory!r} is for rounding, unit by unit; {trains!r} trains the whole model: leave one out"
        )
    files = files_for(limit, checkpoint_dir)
    names = components_of(pipe) if components is None else list(components)
    encoders = {name: _float_component(pipe, name) for name in names if is_text_encoder(name)}
    models = {name: _float_component(pipe, name) for name in names if name not in encoders}
    if not models:
        raise ValueError(f"components={names} names no transformer; give one, such as {components_of(pipe)[0]!r}, too")
    for name, model in models.items():
        check_source(model)
        if hook := _compat.offloading_hook(model):
            raise ValueError(
                f"the {name} carries hooks ({hook}), with which no graph can be captured: call pipe.remove_all_hooks(), "
                "or load the pipeline again, and offload or cache in the quantized one"
            )
    methods = _Methods(
        resolve_transforms(transforms), allocation, budget_bits,
        chosen_config(rounding, objective, scope, adaround, reconstruction), fine_tuning, fine_tune or FineTuneConfig(),
    )  # fmt: skip
    quantized: dict[str, nn.Module] = {
        name: quantize_text_encoder(model, text_encoder_recipe, skip) for name, model in encoders.items()
    }
    every = [x for name, x in pipe.components.items() if _NAME.fullmatch(name) and isinstance(x, nn.Module)]
    for name, model in models.items():
        config, quantizer = recipe_for(model, recipe, fields), quantizer_for(model, recipe, skip, fields, layers)
        methods.check(quantizer.configs)
        needed = search_combination or methods.need_data(quantizer.configs)  # else the shapes of one call are enough
        with contextlib.nullcontext() if needed else uncomputed(every):
            data = collect_samples(
                pipe, prompts, steps=steps, seed=seed, samples=samples if needed else 1, batch_size=batch_size,
                selection=selection, component=name, cache_dir=cache_dir if needed else None,
                memory_limit_bytes=memory_limit_bytes, progress=progress, **call,
            )  # fmt: skip
        folder = checkpoint_dir if checkpoint_dir is None or name == "transformer" else Path(checkpoint_dir) / name
        tried: CombinationReport | None = None
        if search_combination:
            (graph, report, tuned), tried = _searched(model, data, quantizer, methods, folder, progress)
        else:
            graph, report, tuned = _quantized(model, data, quantizer, methods, folder, limit, files, progress)
        source = str(getattr(pipe, "name_or_path", None) or "") or None  # a Path if the pipeline was loaded from one
        decisions = graph_rebuilding.resolve(quantizer.decisions.values(), graph)
        transformer = QuantizedTransformer(graph, model, _description(model, data[0]), decisions, config, source)
        transformer.report, transformer.fine_tuning_report, transformer.combination_report = report, tuned, tried
        quantized[name] = transformer.compile_graph(compile)
    return with_transformers(pipe, quantized, pipeline_arguments.defaults_of(pipe))


def components_of(pipe: "DiffusionPipeline") -> list[str]:
    """Names of a pipeline's transformers: ``transformer``, and ``transformer_2`` where another one takes some of the steps."""
    found = [name for name, x in pipe.components.items() if _NAME.fullmatch(name) and isinstance(x, nn.Module)]
    return sorted(found) or ["transformer"]


@dataclass(frozen=True)
class _Methods:
    """How transformers are quantized, beside their formats."""

    transforms: Sequence[GraphTransform]
    allocation: str
    budget_bits: float | None
    rounding: ReconstructionConfig
    fine_tuning: str | None
    fine_tune: FineTuneConfig

    def check(self, configs: Sequence[QuantConfig]) -> None:
        """Raises ``ValueError`` early for names that are not registered, and a budget that nothing could spend."""
        ALLOCATIONS.find(self.allocation)
        if self.fine_tuning is not None:
            FINE_TUNINGS.find(self.fine_tuning)
        if self.budget_bits is not None and not any(config.weight_candidates for config in configs):
            raise ValueError(
                "budget_bits is shared out among weight_candidates, and this recipe has none; choose a recipe with "
                "candidates, such as w4a6_auto"
            )

    @property
    def round_on_data(self) -> bool:
        return ROUNDINGS.find(self.rounding.rounding).needs_samples

    def need_data(self, configs: Sequence[QuantConfig]) -> bool:
        """Whether more samples are needed than the one that the graph is captured with."""
        return needs_data(configs, self.transforms, self.rounding, self.fine_tuning)


def needs_data(
    configs: Sequence[QuantConfig],
    transforms: Sequence[GraphTransform],
    rounding: ReconstructionConfig,
    fine_tuning: str | None,
) -> bool:
    """Whether anything in these methods looks at calibration data: if not, weights are all that is read.

    Args:
        configs: of all layers.
        transforms, rounding, fine_tuning: as :func:`quantize_pipeline` takes them.
    """
    changes = any(found.needs_data for found in transforms)
    on_data = ROUNDINGS.find(rounding.rounding).needs_samples
    return changes or _calibrates(configs) or on_data or fine_tuning is not None


def _calibrates(configs: Sequence[QuantConfig]) -> bool:
    """Whether observers have to see data: to choose formats and scales of weights, or ranges that do not change from call to
    call."""
    return any(config.weights_need_data or not scheme_of(config).quantizes_online(config) for config in configs)


def _quantized(
    model: nn.Module,
    data: Sequence[Mapping[str, object]],
    quantizer: FP4DiTQuantizer,
    methods: _Methods,
    checkpoint_dir: str | Path | None,
    memory: int | None,
    files: MappedFiles | None,
    progress: bool,
) -> tuple[GraphModule, ReconstructionReport | None, FineTuneReport | None]:
    """The lowered graph of one transformer, and the reports of its rounding and its fine-tuning."""
    with torch.no_grad():
        captured = transform(capture(model, data[0]), data, methods.transforms, quantizer, progress)
        prepared = prepare_pt2e(captured, quantizer)
        if _calibrates(quantizer.configs):
            calibrate(prepared, data, progress=progress)
        how = methods.allocation, methods.budget_bits
        choose_formats(prepared, *how, data, checkpoint_dir=checkpoint_dir, progress=progress)
    report, tuned = None, None
    if methods.round_on_data:
        report = reconstruct(
            prepared, data, methods.rounding, checkpoint_dir=checkpoint_dir, memory=memory, progress=progress
        )
    if methods.fine_tuning is not None:
        folder = None if checkpoint_dir is None else Path(checkpoint_dir) / "fine_tuning"
        tuned = run_fine_tuning(
            prepared, data, methods.fine_tuning, methods.fine_tune, checkpoint_dir=folder, progress=progress
        )
    del captured  # with what was observed, more than the model itself
    return convert_and_lower(prepared, quantizing_device(device_of(model)), files), report, tuned


def _searched(
    model: nn.Module,
    data: Sequence[Mapping[str, object]],
    quantizer: FP4DiTQuantizer,
    methods: _Methods,
    checkpoint_dir: str | Path | None,
    progress: bool,
) -> tuple[tuple[GraphModule, ReconstructionReport | None, FineTuneReport | None], CombinationReport]:
    """As :func:`_quantized`, by the best combination of methods, and what was tried."""
    held = int(HELD_OUT * len(data))  # with less than ten samples all of them judge
    learned, judged = data[: len(data) - held], data[-held:]
    captured = capture(model, data[0])
    calls = calls_of(captured, judged)
    with torch.no_grad():
        wanted = [outputs_of(captured, call) for call in calls]
    key = fingerprint(
        f"{quantizer.configs} {methods.rounding} {methods.allocation} {methods.budget_bits}", captured, data
    )
    del captured

    def quantize(
        found: Combination, folder: Path | None
    ) -> tuple[GraphModule, ReconstructionReport | None, FineTuneReport | None]:
        own = replace(
            methods,
            transforms=resolve_transforms(found.transforms),
            rounding=replace(methods.rounding, rounding=found.rounding),
            fine_tuning=found.fine_tuning,
        )
        return _quantized(model, learned, quantizer, own, folder, None, None, progress)

    roundings = tuple(name for name in dict.fromkeys(("gptq", methods.rounding.rounding)) if name != "nearest")
    folder = None if checkpoint_dir is None else Path(checkpoint_dir) / "combinations"
    search = CombinationSearch(
        quantize, lambda found: total_error(found[0], calls, wanted), roundings, folder, key, progress
    )
    return search.run(), search.report


def _float_component(pipe: "DiffusionPipeline", name: str) -> nn.Module:
    model = getattr(pipe, name, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(pipe).__name__} has no {name} to quantize; a pipeline such as PixArtSigmaPipeline is needed"
        )
    config = getattr(model, "config", {})
    fields = config if isinstance(config, Mapping) else vars(config)  # transformers' configs are objects
    already = getattr(model, "is_quantized", False) or "quantization_config" in fields
    if already or type(model).__name__ == "QuantizedTransformer":
        raise ValueError(
            f"the {name} of this {type(pipe).__name__} is already quantized; start from the float pipeline"
        )
    return model


def _description(model: nn.Module, sample: Mapping[str, object]) -> sample_description.Description:
    return sample_description.describe(bind(model, sample))
