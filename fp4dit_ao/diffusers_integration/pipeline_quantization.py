"""From a float diffusers pipeline to a quantized one in one call."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

from fp4dit_ao.calibration import MEMORY_LIMIT, calibrate, collect_samples, pipeline_arguments
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.config import AdaRoundConfig, QuantConfig, ReconstructionConfig
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.diffusers_integration.pipeline_folder import with_transformer
from fp4dit_ao.families import quantizer_for, recipe_for
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind, capture
from fp4dit_ao.passes.lowering import lower
from fp4dit_ao.passes.reconstruction import ROUNDINGS, reconstruct
from fp4dit_ao.passes.reconstruction.choice import chosen_config
from fp4dit_ao.schemes import scheme_of


def quantize_pipeline(
    pipe: Any,
    recipe: str | QuantConfig = "w4a6",
    *,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    samples: int | None = 128,
    rounding: str | None = None,
    objective: str | None = None,
    scope: str | None = None,
    adaround: AdaRoundConfig | None = None,
    reconstruction: ReconstructionConfig | None = None,
    skip: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 1,
    compile: bool = False,
    cache_dir: str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    memory_limit_bytes: int = MEMORY_LIMIT,
    progress: bool = True,
    **call: Any,
) -> Any:
    """Quantize the transformer of a diffusers pipeline.

    Args:
        pipe: the float pipeline; it stays usable, and shares every component but the transformer with the result.
        recipe: a name in ``config.RECIPES``, taken as it is for the model's family; or a config, taken as it is.
        prompts: calibration prompts; see :func:`fp4dit_ao.collect_samples`, also for ``steps``, ``samples``, ``batch_size``,
            ``seed``, ``cache_dir``, ``memory_limit_bytes`` and for text embeddings in place of prompts.
        rounding: how weights are rounded, a name in ``passes.reconstruction.ROUNDINGS``: ``"nearest"`` takes seconds,
            ``"gptq"`` minutes. ``"adaround"``, the default, learns it as ``adaround`` says.
        objective: what learned rounding minimises, a name in ``OBJECTIVES``; ``"mse"`` by default.
        scope: what is rounded together, a name in ``SCOPES``; ``"block"`` by default.
        adaround: how rounding is learned; the default is ``AdaRoundConfig()``, scale-aware AdaRound.
        reconstruction: all of the five above in one config, in their place.
        skip: globs over module names that stay in high precision, besides the recipe's own.
        compile: run the quantized graph under ``torch.compile``.
        checkpoint_dir: keep the state of the reconstruction there, so that a killed run resumes.
        progress: show progress bars with the time left.
        call: further arguments of the pipeline while calibrating, on top of its ``generation.json``.

    Returns:
        A pipeline of the same class. Its ``transformer`` is a ``QuantizedTransformer`` with ``.summary()`` and ``.report``;
        its ``save_pretrained(dir)`` writes what :func:`load_pipeline` reads.

    Raises:
        ValueError: no transformer, one that is already quantized, an unknown recipe or method, or bad data.
    """
    model = _float_transformer(pipe)
    config = recipe_for(model, recipe)
    rounded = chosen_config(rounding, objective, scope, adaround, reconstruction)
    rounds_on_data = ROUNDINGS.find(rounded.rounding).needs_samples
    needs_calibration = bool(config.weight_candidates) or not scheme_of(config).quantizes_online(config)
    needs_data = needs_calibration or rounds_on_data
    data = collect_samples(
        pipe, prompts, steps=steps, seed=seed, samples=samples if needs_data else 1, batch_size=batch_size,
        cache_dir=cache_dir, memory_limit_bytes=memory_limit_bytes, progress=progress, **call,
    )  # fmt: skip
    quantizer = quantizer_for(model, recipe)
    for glob in skip:
        quantizer.set_module_name(glob, None)
    with torch.no_grad():
        prepared = prepare_pt2e(capture(model, data[0]), quantizer)
        if needs_calibration:
            calibrate(prepared, data, progress=progress)
    report = None
    if rounds_on_data:
        report = reconstruct(prepared, data, rounded, checkpoint_dir=checkpoint_dir, progress=progress)
    with torch.no_grad():
        graph = lower(convert_pt2e(prepared, fold_quantize=False))
    source = str(getattr(pipe, "name_or_path", None) or "") or None  # a Path, if it was loaded from one
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), graph)
    quantized = QuantizedTransformer(graph, model, _description(model, data[0]), decisions, config, source)
    quantized.report = report
    quantized.compile_graph(compile)
    return with_transformer(pipe, quantized, pipeline_arguments.defaults_of(pipe))


def _float_transformer(pipe: Any) -> nn.Module:
    model = getattr(pipe, "transformer", None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{type(pipe).__name__} has no transformer to quantize; a pipeline such as PixArtSigmaPipeline is needed"
        )
    config = getattr(model, "config", {})
    already = getattr(model, "is_quantized", False) or "quantization_config" in config
    if already or type(model).__name__ == "QuantizedTransformer":
        raise ValueError(
            f"the transformer of this {type(pipe).__name__} is already quantized; start from the float pipeline"
        )
    return model


def _description(model: nn.Module, sample: dict[str, Any]) -> Any:
    return sample_description.describe(bind(model, sample))
