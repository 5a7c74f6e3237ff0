"""From a float diffusers pipeline to a quantized one in one call; saving it, and loading it without the float weights."""

import copy
import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fp4dit_ao.calibration import MEMORY_LIMIT, calibrate, collect_samples, pipeline_arguments
from fp4dit_ao.calibration.pipeline_arguments import generation_defaults
from fp4dit_ao.checkpoint import graph_rebuilding, transformer_folder
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.families import quantizer_for, recipe_for
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import capture
from fp4dit_ao.passes.lowering import lower
from fp4dit_ao.passes.weight_unpacking import unpack_weights
from fp4dit_ao.util.atomic_files import whole_folder

if TYPE_CHECKING:
    from fp4dit_ao.passes.reconstruction.engine import AdaRoundConfig

__all__ = ["generation_defaults", "load_pipeline", "quantize_pipeline", "save_pipeline"]

INDEX = "model_index.json"
ROUNDINGS = ("adaround", "nearest")
FORMS = ("graph", "module")
Weights = Literal["packed", "int8", "fp8"]
_HUB = ("push_to_hub", "repo_id", "commit_message", "private", "create_pr", "token")


def quantize_pipeline(
    pipe: Any,
    recipe: str | QuantConfig = "w4a6",
    *,
    prompts: Sequence[str] | None = None,
    steps: int | None = None,
    samples: int | None = 128,
    rounding: Literal["adaround", "nearest"] = "adaround",
    adaround: "AdaRoundConfig | None" = None,
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
        rounding: ``"adaround"`` learns the rounding of weights; ``"nearest"`` takes seconds.
        adaround: how it is learned; the default is ``AdaRoundConfig()``.
        skip: globs over module names that stay in high precision, besides the recipe's own.
        compile: run the quantized graph under ``torch.compile``.
        checkpoint_dir: keep the state of the reconstruction there, so that a killed run resumes.
        progress: show progress bars with the time left.
        call: further arguments of the pipeline while calibrating, on top of its ``generation.json``.

    Returns:
        A pipeline of the same class. Its ``transformer`` is a ``QuantizedTransformer`` with ``.summary()`` and ``.report``;
        its ``save_pretrained(dir)`` writes what :func:`load_pipeline` reads.

    Raises:
        ValueError: no transformer, one that is already quantized, an unknown recipe or rounding, or bad data.
    """
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer

    model = _float_transformer(pipe)
    config = recipe_for(model, recipe)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r}; choose one of {', '.join(ROUNDINGS)}")
    needs_calibration = bool(config.weight_candidates) or config.activation_granularity == "tensor"
    needs_data = needs_calibration or rounding != "nearest"
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
    if rounding == "adaround":
        from fp4dit_ao.passes.reconstruction.engine import AdaRoundConfig, reconstruct

        report = reconstruct(
            prepared, data, adaround or AdaRoundConfig(), checkpoint_dir=checkpoint_dir, progress=progress
        )
    with torch.no_grad():
        graph = lower(convert_pt2e(prepared, fold_quantize=False))
    source = str(getattr(pipe, "name_or_path", None) or "") or None  # a Path, if it was loaded from one
    decisions = graph_rebuilding.resolve(quantizer.decisions.values(), graph)
    quantized = QuantizedTransformer(graph, model, _description(model, data[0]), decisions, config, source)
    quantized.report = report
    quantized.compile_graph(compile)
    return _with_transformer(pipe, quantized, pipeline_arguments.defaults_of(pipe))


def save_pipeline(pipe: Any, folder: str | Path, **kwargs: Any) -> None:
    """Write a quantized pipeline into ``folder``, whole or not at all; a quantized pipeline that is there is replaced.

    ``pipe.save_pretrained`` of a pipeline made here does this. ``kwargs`` are those of diffusers' ``save_pretrained``.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: it cannot be written.
    """
    folder = Path(folder)
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    with whole_folder(folder, replaceable=transformer_folder.is_quantized(folder / "transformer")) as partial:
        type(pipe).save_pretrained(pipe, str(partial), **kwargs)
        defaults = pipeline_arguments.defaults_of(pipe)
        if defaults:
            (partial / pipeline_arguments.FILE).write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    if hub.pop("push_to_hub", False):
        pipe.push_to_hub(hub.pop("repo_id", folder.name), **hub)


def load_pipeline(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    form: Literal["graph", "module"] = "graph",
    weights: Weights = "packed",
) -> Any:
    """The quantized pipeline in ``folder``, which draws what the saved one drew, bit for bit.

    Args:
        folder: what ``save_pretrained`` wrote, or the name of such a repository on the Hugging Face hub.
        device: where to put it; the CPU if None.
        dtype: floating-point type of everything that is not quantized; as saved if None.
        compile: run the quantized transformer under ``torch.compile``.
        form: ``"graph"``: a ``QuantizedTransformer``. ``"module"``: the diffusers model that it was, with quantized weights,
            for LoRA and offloading; see :mod:`fp4dit_ao.diffusers_integration.module_form`.
        weights: memory or speed: ``"packed"``, the codes as they are stored; or ``"int8"`` or ``"fp8"``, a byte for each 4-bit
            weight (:func:`fp4dit_ao.unpack_weights`), which gives up the very last bits, and cannot be saved.

    Raises:
        FileNotFoundError: no such folder, or a file is missing from it.
        ValueError: not a quantized pipeline, or damaged, or its weights do not fit the type; one sentence says how.
    """
    from diffusers import DiffusionPipeline

    folder = resolve_folder(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no pipeline: it has no {INDEX}")
    if not transformer_folder.is_quantized(folder / "transformer"):
        raise ValueError(
            f"{folder} was not quantized by fp4dit_ao; load it with DiffusionPipeline.from_pretrained, then quantize_pipeline"
        )
    if form not in FORMS:
        raise ValueError(f"form={form!r}; choose one of {', '.join(FORMS)}")
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}; choose one of {', '.join(get_args(Weights))}")
    transformer: Any = (transformer_folder.load if form == "graph" else transformer_folder.load_modules)(
        folder / "transformer"
    )
    if dtype is not None:
        transformer.to(dtype)
    if weights != "packed":
        unpack_weights(transformer, weights)
    dtypes = _dtypes(folder) if dtype is None else dtype
    try:
        with warnings.catch_warnings():
            # newer diffusers call the argument dtype, older ones know only torch_dtype
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                str(folder), transformer=None, torch_dtype=dtypes, local_files_only=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"{folder}: a component besides the transformer cannot be loaded: {first}") from error
    if form == "graph":
        transformer.compile_graph(compile)
    elif compile:
        transformer.compile(dynamic=True)
    pipe = _with_transformer(pipe, transformer, generation_defaults(folder))
    return pipe.to(device) if device is not None else pipe


def resolve_folder(name: str | Path) -> Path:
    """``name`` if it is a folder, else the local copy of the Hugging Face repository of that name, downloaded if need be.

    Raises:
        FileNotFoundError: neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    parts = str(name).split("/")
    if len(parts) == 2 and all(parts) and not str(name).startswith((".", "~")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(name)))
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"there is no folder {name}, and no such model on the hub: {first}") from error
    raise FileNotFoundError(f"there is no folder {name}")


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
    from fp4dit_ao.graph_capture.capturing import bind

    return sample_description.describe(bind(model, sample))


def _with_transformer(pipe: Any, transformer: nn.Module, defaults: dict[str, Any]) -> Any:
    """A shallow copy of ``pipe`` with another transformer, which saves itself whole or not at all."""
    new = copy.copy(pipe)
    new._progress_bar_config = dict(getattr(pipe, "_progress_bar_config", {}))
    new.register_modules(transformer=transformer)
    new.generation_defaults = defaults
    new.save_pretrained = functools.partial(save_pipeline, new)
    return new


def _dtypes(folder: Path) -> dict[str, torch.dtype]:
    """For each component, the floating-point type that most bytes of its safetensors files have."""
    dtypes: dict[str, torch.dtype] = {"default": torch.float32}
    for component in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "transformer"):
        sizes: dict[torch.dtype, int] = {}
        for file in component.glob("*.safetensors"):
            try:
                with safe_open(file, "pt") as opened:
                    for name in opened.keys():  # noqa: SIM118, not a dict
                        part = opened.get_slice(name)
                        dtype = _SAFETENSORS.get(part.get_dtype())
                        if dtype is not None:
                            count = functools.reduce(lambda a, b: a * b, part.get_shape(), 1)
                            sizes[dtype] = sizes.get(dtype, 0) + count * dtype.itemsize
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file} is damaged: {error}; copy it again") from error
        if sizes:
            dtypes[component.name] = max(sizes, key=lambda dtype: sizes[dtype])
    return dtypes


_SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
"""Floating-point types by the names in safetensors headers."""
