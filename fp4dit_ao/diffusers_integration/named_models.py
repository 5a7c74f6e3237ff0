"""Pipelines by the name that a user types: ``reference``, a folder, or a hub id; float or quantized."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from torch import nn
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import reference
from fp4dit_ao.checkpoint import transformer_folder
from fp4dit_ao.diffusers_integration.folders_and_devices import resolve_folder
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.diffusers_integration.layer_summary import beside_weights, bits_per_weight
from fp4dit_ao.diffusers_integration.pipeline_folder import (
    Weights,
    load_pipeline,
    stored_dtypes,
    text_encoders_of,
)
from fp4dit_ao.reference.accuracy import spread_out
from fp4dit_ao.util.sentences import first_line

STORED = "stored"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Types that a pipeline can be loaded in, by the names that a user types; :data:`STORED` is as its files have it."""
REFERENCE = "reference"
"""Name of the pipeline that ships with the package."""


def folder_of(name: str) -> str:
    """Folder of the pipeline ``name``. Hub ids are returned unchanged, or as their local copy if this package quantized
    them.

    Raises:
        FileNotFoundError: ``name`` is neither a folder nor spelled like a hub id (``owner/name``).
        ValueError: the folder holds no pipeline.
    """
    if name == REFERENCE:
        return str(reference.path())
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"{name} is no pipeline: it has no model_index.json; give a folder that save_pretrained wrote"
            )
        return str(path)
    parts = name.split("/")
    if path.exists() or len(parts) != 2 or not all(parts) or name.startswith((".", "~")):
        raise FileNotFoundError(f"there is no folder {name}; give a pipeline's folder, a hub id, or 'reference'")
    return _from_hub(name)


@functools.lru_cache
def _from_hub(name: str) -> str:
    from huggingface_hub import hf_hub_download

    try:
        config = Path(hf_hub_download(name, "transformer/config.json"))
    except (
        OSError,
        ValueError,
    ):  # opening the pipeline will say what is wrong
        return name
    return str(resolve_folder(name)) if transformer_folder.is_quantized(config.parent) else name


def is_reference(name: str) -> bool:
    """Whether ``name`` is the shipped pipeline, whose prompts have true pictures."""
    return Path(folder_of(name)).resolve() == reference.path().resolve()


def is_quantized(name: str) -> bool:
    """Whether ``name`` is a pipeline that this package quantized."""
    return transformer_folder.is_quantized(Path(folder_of(name)) / "transformer")


def weights_of(name: str, weights: str) -> Weights:
    """Checks that the pipeline ``name`` can be loaded with ``weights``; returns them typed for ``load_pipeline``.

    Raises:
        FileNotFoundError: there is no such pipeline; see :func:`folder_of`.
        ValueError: the form of weights is unknown, or the pipeline has no packed weights to make it from.
    """
    if weights not in get_args(Weights):
        raise ValueError(f"unknown weights {weights!r}; choose one of {', '.join(get_args(Weights))}")
    if not is_quantized(name) and weights != "packed":
        raise ValueError(f"{name} was not quantized by fp4dit-ao, it has no packed weights to turn into {weights}")
    return cast(Weights, weights)


def default_device() -> str:
    """Name of the default device: ``"cuda"``, or ``"cpu"`` without a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def open_pipeline(
    name: str,
    device: str | None = None,
    *,
    compile: bool = False,
    weights: str = "packed",
    dtype: str = STORED,
    text_encoders: bool = True,
) -> DiffusionPipeline:
    """Loads the pipeline ``name``.

    Args:
        name: see :func:`folder_of`.
        device: :func:`default_device` if None.
        compile: run a quantized transformer under ``torch.compile``.
        weights: form of a quantized transformer's weights; see :func:`fp4dit_ao.load_pipeline`.
        dtype: floating-point type of what is not quantized, a key of :data:`DTYPES`; or ``"stored"``, as each component's
            files have it, but float32 for float16 on a CPU, which is slow at half precision.
        text_encoders: whether a float pipeline's text encoders are loaded. Without them it takes encoded prompts alone, and
            the files of its text encoders are copied when it is saved.

    Raises:
        OSError: the pipeline cannot be found or read.
        ValueError: ``name`` is no pipeline, its weights do not exist in this form, or the type is unknown.
    """
    if dtype != STORED and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; choose one of {STORED}, {', '.join(DTYPES)}")
    folder = folder_of(name)
    form, device = weights_of(name, weights), device or default_device()
    logging.disable_progress_bar()  # the bar of opening files ends before it could be read
    if is_quantized(name):
        return load_pipeline(folder, device=device, compile=compile, weights=form, dtype=DTYPES.get(dtype))
    try:
        if (dtype == STORED or not text_encoders) and not Path(folder).is_dir():
            folder = DiffusionPipeline.download(folder)
        left_out = {} if text_encoders else text_encoders_of(Path(folder))
        dtypes = _loaded_dtypes(folder, device, list(left_out)) if dtype == STORED else DTYPES[dtype]
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, **dict.fromkeys(left_out)).to(device)
        pipe.left_out = left_out
        return pipe
    except Exception as error:
        raise OSError(f"{name} cannot be loaded as a diffusers pipeline: {first_line(error)}") from error


def _loaded_dtypes(folder: str, device: str, leave: Sequence[str] = ()) -> dict[str, torch.dtype]:
    slow = torch.float16 if device == "cpu" else None
    return {part: torch.float32 if x is slow else x for part, x in stored_dtypes(Path(folder), leave).items()}


def default_prompts(name: str, count: int) -> list[str]:
    """Default prompts: ``count`` of the reference pipeline's own, spread over all of them.

    Raises:
        ValueError: ``name`` is another model, which needs prompts.
    """
    if not is_reference(name):
        raise ValueError(f"{name} needs prompts; give --prompts FILE, one prompt a line")
    return [reference.prompts()[index] for index in reference_indices(count)]


def reference_indices(count: int) -> list[int]:
    """Positions of ``count`` prompts, evenly spread over the reference pipeline's.

    Raises:
        ValueError: ``count`` is below 1, or above the number of prompts.
    """
    return spread_out(count)


def known_prompts(prompts: list[str]) -> list[int] | None:
    """Positions of ``prompts`` among the reference pipeline's; None if it was not trained on all of them."""
    places = {text: index for index, text in enumerate(reference.prompts())}
    return [places[text] for text in prompts] if all(text in places for text in prompts) else None


def size_at_16_bits(transformer: nn.Module) -> tuple[int, float]:
    """Bytes and bits per weight of a transformer, counting everything that is not quantized at 16 bits.

    Bits per weight are those of the quantized linears; scales count, and what transforms keep beside the weights, such as a
    branch of low rank. 16 for a float model.
    """
    summary = transformer.summary() if isinstance(transformer, QuantizedTransformer) else []
    packed = sum(row.bytes for row in summary if row.kind == "linear" and row.quantized)
    other = sum(p.numel() for p in transformer.parameters() if not isinstance(p.detach(), TorchAOBaseTensor))
    beside = beside_weights(transformer.graph, summary) if isinstance(transformer, QuantizedTransformer) else 0
    return packed + 2 * (other + beside), bits_per_weight(summary, beside)
