"""Text encoders with low-bit weights: transformers' models in a pipeline, rounded to nearest, saved and loaded with it.

Without calibration data: weights alone, or with inputs that are quantized online. A folder has the format of a transformer's
(:mod:`~fp4dit_ao.checkpoint.transformer_folder`); transformers itself refuses it, for it does not know the method.
"""

import copy
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fp4dit_ao import _compat
from fp4dit_ao.checkpoint import graph_rebuilding, graph_tensors, tensor_files, transformer_folder
from fp4dit_ao.checkpoint.quantization_record import Record, model_config
from fp4dit_ao.checkpoint.transformer_folder import SHARD_SIZE
from fp4dit_ao.config import DEFAULT_RECIPE, Fields, QuantConfig
from fp4dit_ao.diffusers_integration.data_parallel import leave_low_bit_weights
from fp4dit_ao.diffusers_integration.float_source import check_weight
from fp4dit_ao.diffusers_integration.module_form import memory_footprint, quantize_linear
from fp4dit_ao.diffusers_integration.module_slots import quantized_linears
from fp4dit_ao.families.dtypes import is_kept, main_dtype
from fp4dit_ao.families.patterns import KEPT, outside_blocks
from fp4dit_ao.passes.device_placement import convert_tensors
from fp4dit_ao.quantizer import Decision, fit_group
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.util.sentences import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_text_encoder(component: str) -> bool:
    """Whether a pipeline's component of that name is a text encoder."""
    return component.startswith("text_encoder")


def text_encoder_config(recipe: str | QuantConfig | None) -> QuantConfig:
    """Config of a text encoder's linears: of ``recipe`` what needs neither a graph nor data; by default, its weights alone.

    Raises:
        ValueError: no such recipe, or one whose inputs have static ranges.
    """
    if isinstance(recipe, QuantConfig):
        config = recipe
    else:
        config = QuantConfig.from_name(recipe or DEFAULT_RECIPE)
        fields: Fields = {"attention": None, "pre_gelu_weight": None, "indivisible": "divisor"}
        config = dataclasses.replace(config, **fields if recipe else {**fields, "activation": None})
    if config.weights_need_data or not scheme_of(config).quantizes_online(config):
        raise ValueError(
            f"text encoder recipe {recipe} needs calibration data, which text encoders do not get; choose one that quantizes "
            "inputs online, such as w4a8"
        )
    return config


@torch.no_grad()
def quantize_text_encoder(
    model: "PreTrainedModel", recipe: str | QuantConfig | None = None, skip: Sequence[str] = ()
) -> "PreTrainedModel":
    """A copy of a text encoder whose linears in numbered blocks have low-bit weights, rounded to nearest.

    Args:
        model: from transformers; not changed, and shares with the copy what is not quantized.
        recipe: a name in ``config.RECIPES``, or a config; None: the default recipe's weights, with float inputs.
        skip: globs over names of modules that stay in high precision.

    Raises:
        ValueError: the recipe needs calibration data, or the model has no float linears in numbered blocks.
    """
    config = text_encoder_config(recipe)
    kept = (*KEPT, *outside_blocks(model), *config.skip, *skip)
    decisions = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        check_weight(f"{name}.weight", module.weight)
        glob = next((glob for glob in kept if fnmatchcase(name, glob)), None)
        chosen, reason = (None, f"{glob!r} is kept") if glob else fit_group(name, module.in_features, config, "recipe")
        decisions.append(Decision(name, "linear", chosen, reason))
    decisions = graph_rebuilding.resolve(decisions, nn.Module())
    dtype = main_dtype(model.named_parameters(), _compat.kept_in_float32(model))
    record = Record(decisions, dtype, config, str(getattr(model, "name_or_path", "")) or None)
    if not any(True for _ in quantized_linears(record)):
        raise ValueError(
            f"nothing in this {type(model).__name__} would be quantized: it has no linears in numbered blocks"
        )
    new = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    for name, own in quantized_linears(record):
        quantize_linear(new, name, own)
        linear = new.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight.to(_presented(new, name, dtype)), requires_grad=False)
    return _finished(new, record)


def _presented(model: nn.Module, name: str, dtype: torch.dtype) -> torch.dtype:
    """Type that the weight of a linear presents itself as: float32 where float16 would overflow, as T5 says of its own."""
    return torch.float32 if dtype == torch.float16 and is_kept(name, _compat.kept_in_float32(model)) else dtype


def _finished(model: "PreTrainedModel", record: Record) -> "PreTrainedModel":
    """``model``, which from now on saves itself in this package's format."""
    model.save_pretrained = functools.partial(save_text_encoder, model, record)
    model.get_memory_footprint = functools.partial(memory_footprint, model)
    _compat.replace_apply(model, functools.partial(_apply, model))
    leave_low_bit_weights(model)
    return model.eval()


def _apply(model: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    convert_tensors(model, convert)
    return model


def save_text_encoder(
    model: "PreTrainedModel",
    record: Record,
    save_directory: str | Path,
    safe_serialization: bool = True,
    max_shard_size: int | str = SHARD_SIZE,
    **options: object,
) -> None:
    """``save_pretrained`` of a quantized text encoder.

    Raises:
        ValueError: pickles are requested.
        OSError: the folder cannot be written.
    """
    if not safe_serialization:
        raise ValueError("a quantized text encoder is saved as safetensors only; leave safe_serialization=True")
    config = json.loads(model.config.to_json_string(use_diff=False)) | {"_class_name": type(model).__name__}
    dtype = main_dtype(model.named_parameters(), _compat.kept_in_float32(model))
    stored = dataclasses.replace(record, model=model_config(config), dtype=dtype)
    transformer_folder.save(stored, dict(_tensors(model)), save_directory, max_shard_size)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Plain tensors of a model's state, by name; what several modules share comes once."""
    state = set(model.state_dict())
    for name, x in graph_tensors.tensors_of(model):
        if name in state:
            yield from graph_tensors.flatten(name, x.detach()).items()


def load_text_encoder(folder: str | Path) -> "PreTrainedModel":
    """Loads the text encoder in ``folder``, on the CPU, without allocating float weights.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: the folder holds something else or is damaged, or transformers has no such model.
    """
    folder = Path(folder)
    record = transformer_folder.read_record(folder)
    linears = dict(quantized_linears(record))
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in linears}
    stored = dict(tensor_files.read(folder, record.tensors))
    try:
        model = _empty(record)
        names = _names_by_tensor(model)
        for name, x in stored.items():
            linear, _, part = name.rpartition(".weight.")
            if linear in linears:
                parts[linear][part] = x
            else:
                graph_tensors.put_tensor(model, name, x)
                for other in set(names.get(name, ())) - {name}:
                    owner, _, leaf = other.rpartition(".")
                    setattr(model.get_submodule(owner), leaf, model.get_parameter(name))
        for name, config in linears.items():
            weight = scheme_of(config).from_parts(parts[name], config, _presented(model, name, record.dtype))
            model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    except Exception as error:  # a config that does not fit can make a model raise anything
        raise ValueError(f"{folder} does not fit its own config: {first_line(error)}") from error
    missing = [name for name, x in graph_tensors.tensors_of(model) if x.is_meta]
    if missing:
        raise ValueError(f"{folder} lacks tensor {missing[0]} ({len(missing)} in all); copy the folder again")
    return _finished(model, record)


def _empty(record: Record) -> "PreTrainedModel":
    """The model that the record describes: parameters on the meta device, buffers as the model makes them."""
    import transformers
    from accelerate import init_empty_weights

    name = str(record.model.get("_class_name"))
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ValueError(
            f"transformers {transformers.__version__} has no model class {name!r}; install a version that does"
        )
    fields = {key: value for key, value in record.model.items() if not key.startswith("_")}
    config = cls.config_class.from_dict(fields)  # type: ignore[attr-defined]
    with init_empty_weights(include_buffers=False):
        model = cls(config).eval()
    model.tie_weights()
    return model


def _names_by_tensor(model: nn.Module) -> dict[str, list[str]]:
    """All names of each parameter, by every one of them: embeddings are often shared."""
    groups: dict[int, list[str]] = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(x), []).append(name)
    return {name: names for names in groups.values() for name in names}
