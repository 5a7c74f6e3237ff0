"""Saving quantized pipelines, whole or not at all, and loading them without float weights."""

import copy
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from fp4dit_ao import _compat
from fp4dit_ao.calibration.pipeline_arguments import CallArguments, generation_defaults
from fp4dit_ao.checkpoint import component_checksums, transformer_folder
from fp4dit_ao.checkpoint.tensor_files import read_json
from fp4dit_ao.diffusers_integration.call_defaults import with_call_defaults
from fp4dit_ao.diffusers_integration.damaged_components import INDEX, reason_not_loaded
from fp4dit_ao.diffusers_integration.folders_and_devices import resolve_folder
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer, load_graph
from fp4dit_ao.diffusers_integration.module_conversion import load_modules
from fp4dit_ao.diffusers_integration.text_encoders import load_text_encoder
from fp4dit_ao.diffusers_integration.weight_forms import keep_fastest
from fp4dit_ao.passes.weight_unpacking import unpack_weights
from fp4dit_ao.util.atomic_files import whole_folder
from fp4dit_ao.util.plain_mode import plain_mode

Weights = Literal["packed", "int8", "fp8", "auto"]
"""Forms of quantized weights in memory; see :func:`load_pipeline`."""

_HUB = ("push_to_hub", "repo_id", "commit_message", "private", "create_pr", "token")

_LOADERS: dict[str, Callable[[Path], nn.Module]] = {"graph": load_graph, "module": load_modules}
"""Functions that load a transformer from its folder, by form."""


def save_pipeline(pipe: DiffusionPipeline, folder: str | Path, **kwargs: Any) -> None:
    """Writes a quantized pipeline into ``folder``, whole or not at all; an existing quantized pipeline is replaced.

    This is ``pipe.save_pretrained`` of quantized pipelines; ``kwargs`` are those of diffusers' method.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    hub = {key: kwargs.pop(key) for key in _HUB if key in kwargs}
    with whole_folder(folder, replaceable=transformer_folder.is_quantized(folder / "transformer")) as partial:
        with_call_defaults(pipe)
        _forget_last_call(pipe)
        type(pipe).save_pretrained(pipe, str(partial), **kwargs)
        _copy_left_out(pipe, partial)
        component_checksums.write(partial)
    if hub.pop("push_to_hub", False):
        pipe.push_to_hub(hub.pop("repo_id", folder.name), **hub)


def text_encoders_of(folder: Path) -> dict[str, Path]:
    """Folders of the text encoders of the pipeline in ``folder``, by component."""
    index = read_json(folder / INDEX)
    found = index.items() if isinstance(index, dict) else ()
    return {name: folder / name for name, entry in found if name.startswith("text_encoder") and entry and entry[0]}


def _check_index(folder: Path) -> None:
    """Raises ``ValueError`` if the pipeline's index is no object, or gives a component anything but library and class."""
    index = read_json(folder / INDEX)
    if not isinstance(index, dict):
        raise ValueError(
            f"{folder / INDEX} is damaged: expected a JSON object, found {type(index).__name__}; copy it again"
        )
    for name, entry in index.items():
        names = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
        if not names and name.isidentifier() and (folder / name).is_dir():
            raise ValueError(
                f"{folder / INDEX} is damaged: {name} is {entry!r}; expected its library and class, two texts; copy it again"
            )


def _copy_left_out(pipe: DiffusionPipeline, folder: Path) -> None:
    """Copies the components that were left out when ``pipe`` was loaded into ``folder``, from the folder they are in."""
    left_out = {name: source for name, source in getattr(pipe, "left_out", {}).items() if getattr(pipe, name) is None}
    if not left_out:
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    for name, source in left_out.items():
        shutil.copytree(source, folder / name)
        index[name] = json.loads((source.parent / INDEX).read_text(encoding="utf-8"))[name]
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_last_call(pipe: DiffusionPipeline) -> None:
    """Clears the padding and length that tokenizers keep of their last call, and would save; each call sets its own."""
    for component in pipe.components.values():
        backend = getattr(component, "backend_tokenizer", None)
        if backend is not None:
            backend.no_padding()
            backend.no_truncation()


@plain_mode()
def load_pipeline(
    folder: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    form: Literal["graph", "module"] = "graph",
    weights: Weights = "packed",
) -> DiffusionPipeline:
    """Loads the quantized pipeline in ``folder``; its images equal those of the saved pipeline in every bit.

    Args:
        folder: a folder that ``save_pretrained`` wrote, or the name of such a repository on the Hugging Face hub.
        device: device of the pipeline; the CPU if None.
        dtype: floating-point type of everything that is not quantized; as saved if None.
        compile: run the quantized transformer under ``torch.compile``.
        form: ``"graph"``: a ``QuantizedTransformer``. ``"module"``: the original diffusers model with quantized
            weights, for LoRA and offloading; see :mod:`fp4dit_ao.diffusers_integration.module_form`.
        weights: ``"packed"`` keeps the stored codes. ``"int8"`` and ``"fp8"`` take a byte per 4-bit weight and are
            faster (:func:`fp4dit_ao.unpack_weights`); results differ in the last bits. ``"auto"`` holds in bfloat16 what
            is faster so on ``device`` (measured for some seconds, then kept in the user's cache), and on a GPU as bytes what
            is faster so and fits, in a model that runs in bfloat16 and in the graph form. A pipeline whose weights are not
            packed cannot be saved.

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing from it.
        ValueError: the folder holds no quantized pipeline or is damaged, or its weights do not fit the type.
    """
    folder = resolve_folder(folder)
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no pipeline: it has no {INDEX}")
    _check_index(folder)
    if not transformer_folder.is_quantized(folder / "transformer"):
        raise ValueError(
            f"{folder} was not quantized by fp4dit_ao; load it with DiffusionPipeline.from_pretrained, then quantize_pipeline"
        )
    if form not in _LOADERS:
        raise ValueError(f"form={form!r}; choose one of {', '.join(_LOADERS)}")
    if weights not in get_args(Weights):
        raise ValueError(f"weights={weights!r}; choose one of {', '.join(get_args(Weights))}")
    if weights == "auto" and form != "graph":
        raise ValueError("weights='auto' reads from a graph how many tokens each layer sees; load it with form='graph'")
    found = {path.name for path in folder.glob("transformer*") if transformer_folder.is_quantized(path)}
    transformers = {name: _LOADERS[form](folder / name) for name in sorted(found)}
    encoders = {
        path.name: load_text_encoder(path)
        for path in sorted(folder.glob("text_encoder*"))
        if transformer_folder.is_quantized(path)
    }
    for encoder in encoders.values():
        if dtype is not None:
            encoder.to(dtype)
    for transformer in transformers.values():
        if dtype is not None:
            transformer.to(dtype)
        if weights == "auto" and isinstance(transformer, QuantizedTransformer):
            keep_fastest(transformer, torch.device(device or "cpu"))
        elif weights != "packed":
            unpack_weights(transformer, weights)
    dtypes = stored_dtypes(folder, leave=[*found, *encoders]) if dtype is None else dtype
    component_checksums.check(folder)
    defaults = generation_defaults(folder)  # which from_pretrained reads, too
    try:
        with warnings.catch_warnings():
            # newer diffusers call the argument dtype, older ones know only torch_dtype
            warnings.simplefilter("ignore", FutureWarning)
            pipe = DiffusionPipeline.from_pretrained(
                str(folder), **dict.fromkeys((*transformers, *encoders)), torch_dtype=dtypes, local_files_only=True
            )
    except Exception as error:  # a damaged config can make diffusers and transformers raise anything
        raise ValueError(reason_not_loaded(folder, error, (*transformers, *encoders))) from error
    for transformer in transformers.values():
        if isinstance(transformer, QuantizedTransformer):
            transformer.compile_graph(compile)
        elif compile:
            transformer.compile(dynamic=True)
    pipe = with_transformers(pipe, transformers | encoders, defaults)
    return pipe.to(device) if device is not None else pipe


def with_transformers(
    pipe: DiffusionPipeline, transformers: Mapping[str, nn.Module], defaults: CallArguments
) -> DiffusionPipeline:
    """Shallow copy of ``pipe`` with other transformers and text encoders, whose ``save_pretrained`` is :func:`save_pipeline`.

    Args:
        pipe: the pipeline to copy.
        transformers: the new ones, by the names of components.
        defaults: call arguments for ``generation.json``.
    """
    new = copy.copy(pipe)
    new.set_progress_bar_config(**_compat.progress_bar_config(pipe))
    new.register_modules(**transformers)
    new.generation_defaults = defaults
    new.save_pretrained = functools.partial(save_pipeline, new)
    return with_call_defaults(new)


def stored_dtypes(folder: Path, leave: Sequence[str] = ()) -> dict[str, torch.dtype]:
    """Floating-point type of each component: the one that most bytes of its safetensors files have.

    Args:
        folder: folder of a pipeline.
        leave: names of components that are not looked at.

    Raises:
        ValueError: a file is damaged.
    """
    dtypes: dict[str, torch.dtype] = {"default": torch.float32}
    for component in sorted(path for path in folder.iterdir() if path.is_dir() and path.name not in leave):
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
"""Floating-point types, by their names in safetensors headers."""
