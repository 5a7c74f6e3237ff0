"""Module form: a diffusers model keeps its modules, and the weights of its linears become low-bit tensors.

It computes the same as the graph form (:func:`fp4dit_ao.lower`), and keeps the module hierarchy that LoRA, offloading and
``.to()`` rely on. Wrapped attention processors quantize q, k and v.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.checkpoint import graph_rebuilding, graph_tensors, transformer_folder
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.checkpoint.quantization_record import Record, model_config
from fp4dit_ao.checkpoint.tensor_files import Entry
from fp4dit_ao.checkpoint.transformer_folder import SHARD_SIZE
from fp4dit_ao.config import DEFAULT_RECIPE, QuantConfig
from fp4dit_ao.diffusers_integration import lora
from fp4dit_ao.diffusers_integration.attention_processors import quantize_attention, restore_attention
from fp4dit_ao.diffusers_integration.data_parallel import leave_low_bit_weights
from fp4dit_ao.diffusers_integration.module_slots import Slots, quantized_linears
from fp4dit_ao.diffusers_integration.saving import refuse_unsaveable, save_pretrained
from fp4dit_ao.families import example_inputs, family_of, quantizer_for, recipe_for
from fp4dit_ao.families.dtypes import main_dtype
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.passes.device_placement import convert_tensors, quantizing_device
from fp4dit_ao.passes.graph_products import EXPERTS
from fp4dit_ao.passes.transforms.graph_transform import GraphTransform
from fp4dit_ao.passes.transforms.registry import applied_transforms, transform_named
from fp4dit_ao.passes.transforms.scaled_linear import unscale_modules
from fp4dit_ao.passes.transforms.split_inputs import SplitInputs, SplitLinear, join_modules, whole_name
from fp4dit_ao.quantizer import Decision, FP4DiTQuantizer, fit_group
from fp4dit_ao.schemes import scheme_of
from fp4dit_ao.util.freed_memory import return_freed

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from fp4dit_ao.diffusers_integration.hf_quantizer import FP4DiTDiffusersQuantizer


def decide(
    model: "ModelMixin",
    recipe: str | QuantConfig = DEFAULT_RECIPE,
    *,
    skip: Sequence[str] = (),
    sample: Mapping[str, object] | None = None,
    source: str | None = None,
    transforms: Sequence[str | GraphTransform] = (),
) -> Record:
    """Decides how :func:`quantize_modules` would quantize ``model``, without changing it; tensors may be on the meta
    device."""
    config = recipe_for(model, recipe)
    if without_data(transforms):
        config = recipe = dataclasses.replace(config, split_inputs=True)
    asked = recipe if isinstance(recipe, str) else config
    if not scheme_of(config).quantizes_online(config):
        raise ValueError(
            f"recipe {asked} needs calibration data for static input ranges, which only the graph form computes; "
            "use quantize_pipeline, or a recipe that quantizes inputs online"
        )
    if config.attention_probabilities is not None:
        raise ValueError(
            f"recipe {asked} has attention_probabilities, which only the graph form computes; use quantize_pipeline, or leave "
            "it out"
        )
    if config.weights_need_data:
        raise ValueError(
            f"recipe {asked} needs calibration data; use quantize_pipeline, then load_pipeline(…, form='module')"
        )
    quantizer = quantizer_for(model, recipe, skip)
    dtype = main_dtype(model.named_parameters(), _compat.kept_in_float32(model))
    if sample is None and family_of(model).sample is not None:
        sample = example_inputs(model, dtype=dtype)
    description: sample_description.Description | None = None
    applied: list[GraphTransform] = []
    if sample is None:
        decisions = _decisions_by_name(model, quantizer)
    else:
        description = sample_description.describe(bind(model, sample))
        empty = empty_model(dict(model.config), cls=type(model))
        prepared = graph_rebuilding.prepare(empty, description, dtype, quantizer)
        decisions = graph_rebuilding.resolve(quantizer.decisions.values(), prepared)
        applied = applied_transforms(prepared)
    record = Record(decisions, dtype, config, source, description, applied)
    if not any(True for _ in quantized_linears(record)):
        raise ValueError(f"nothing in this {type(model).__name__} would be quantized; check the skip globs")
    return record


def without_data(transforms: Sequence[str | GraphTransform]) -> bool:
    """Whether inputs are to be split: the one graph transform that needs no data and no graph.

    Raises:
        ValueError: an unknown transform, or one that needs calibration data.
    """
    found = [type(transform_named(t) if isinstance(t, str) else t) for t in transforms]
    other = next((transform for transform in found if not issubclass(transform, SplitInputs)), None)
    if other is not None:
        needs = "calibration data" if other.needs_data else "the model's graph"
        raise ValueError(
            f"transform {other.name!r} needs {needs}; use quantize_pipeline(…, transforms=[{other.name!r}]), "
            "then load_pipeline(…, form='module')"
        )
    return bool(found)


def _decisions_by_name(model: "ModelMixin", quantizer: FP4DiTQuantizer) -> list[Decision]:
    """Decisions for a model that cannot be captured: every ``nn.Linear`` and attention module, by the quantizer's
    rules."""
    decisions = []
    for name, module in model.named_modules():
        if _holds_experts(module):
            decisions.append(Decision(name, "linear", None, EXPERTS))
        kind: Literal["linear", "attention"] | None = (
            "linear" if isinstance(module, nn.Linear) else "attention" if hasattr(module, "processor") else None
        )
        if kind is None:
            continue
        config, reason = quantizer.config_for(name)
        if config is not None and config.pre_gelu_weight not in (None, config.weight):
            raise ValueError(
                f"{type(model).__name__} is no family that fp4dit_ao knows, so it cannot tell which linears feed a gate; "
                "give sample=, the keyword arguments of one forward, or a recipe with pre_gelu_weight=None"
            )
        if config is not None and kind == "linear":
            config, reason = fit_group(name, module.in_features, config, reason)
        decisions.append(Decision(name, kind, config, reason))
    return graph_rebuilding.resolve(decisions, nn.Module())


def _holds_experts(module: nn.Module) -> bool:
    """Whether ``module`` has one parameter, (experts, in, out), for the linears of several experts."""
    experts = getattr(module, "num_experts", None)
    return any(x.ndim == 3 and x.shape[0] == experts for x in module.parameters(recurse=False))


def quantize_linear(model: "ModelMixin", name: str, config: QuantConfig) -> None:
    """Quantizes the weight of a linear with nearest rounding, in place; on the GPU if there is one.

    Raises:
        ValueError: the weight holds NaN or Inf, or the group size does not divide its inputs.
    """
    linear = model.get_submodule(name)
    home = linear.weight.device
    weight = scheme_of(config).round_to_nearest(name, linear.weight.to(quantizing_device(home)), config)
    linear.weight = nn.Parameter(weight.to(home), requires_grad=False)
    return_freed(weight.numel())


def finish(model: "ModelMixin", quantizer: "FP4DiTDiffusersQuantizer") -> "ModelMixin":
    """Wraps attention processors, and makes ``model`` save itself in this package's format.

    Args:
        model: a model whose linears are quantized.
        quantizer: an ``FP4DiTDiffusersQuantizer`` with the model's quantization record.
    """
    record = quantizer.record
    assert record is not None, "a model is finished once it is decided how it is quantized"
    for decision in record.decisions:
        if decision.kind == "attention" and decision.config is not None and decision.config.attention is not None:
            name = decision.name.partition("#")[0]  # one decision for each call inside of one module
            quantize_attention(model.get_submodule(name), decision.config.attention, name)
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method
    model.is_quantized = False  # diffusers refuses .to(dtype) where this is True; here that casts what is not quantized
    model.register_to_config(quantization_config=quantizer.quantization_config)
    blocks = (block for module in model.children() if isinstance(module, nn.ModuleList) for block in module)
    _compat.name_repeated_blocks(model, (type(block).__name__ for block in blocks))
    model.save_pretrained = functools.partial(save_module_form, model)
    model.fuse_lora = functools.partial(lora.fuse_lora, model, dict(quantized_linears(record)))
    model.unfuse_lora = functools.partial(lora.unfuse_lora, model)
    model.get_memory_footprint = functools.partial(memory_footprint, model)
    if hasattr(model, "fuse_qkv_projections"):
        model.fuse_qkv_projections = _fusing_refused
    _compat.replace_apply(model, functools.partial(_apply, model))
    leave_low_bit_weights(model)
    for module in model.modules():
        if isinstance(module, SplitLinear):
            module.list_whole_weight()
    refused = {
        whole_name(name): why for transform in record.transforms for name, why in transform.refused_loras().items()
    }
    for method in ("load_lora_adapter", "add_adapter"):
        if record.transforms and hasattr(model, method):
            setattr(model, method, functools.partial(lora.add_checked, model, method, refused))
    return model.eval()


def _apply(model: "ModelMixin", convert: Callable[[Tensor], Tensor], recurse: bool = True) -> "ModelMixin":
    """Replaces ``nn.Module._apply``, which fails on weights that a compiled model holds weak references to."""
    convert_tensors(model, convert)
    return model


def is_module_form(model: object) -> bool:
    """Whether ``model`` is a diffusers model whose linears this package quantized."""
    return getattr(getattr(model, "hf_quantizer", None), "record", None) is not None


def record_of(model: "ModelMixin") -> Record:
    """Record of how a model in the module form was quantized, with its current config and dtype.

    Raises:
        ValueError: the model was not quantized by this package.
    """
    if not is_module_form(model):
        raise ValueError(f"this {type(model).__name__} was not quantized by fp4dit_ao")
    dtype = main_dtype(model.named_parameters(), _compat.kept_in_float32(model))
    own = model_config(dict(model.config) | {"_class_name": type(model).__name__})
    record: Record = model.hf_quantizer.record
    float_model = None if model.hf_quantizer.pre_quantized else model.config.get("_name_or_path")
    source = record.source or (str(float_model) if float_model else None)
    return dataclasses.replace(record, dtype=dtype, model=own, source=source)


def tensors_to_save(model: "ModelMixin") -> dict[str, Tensor]:
    """Plain tensors of a model in the module form, by their names in a graph, with codes and scales as separate tensors."""
    record: Record = model.hf_quantizer.record
    every = dict(model.named_parameters()) | dict(model.named_buffers()) | record.constants
    for transform in record.transforms:
        for name in transform.shared_tensors():
            every.pop(name, None)
    return {part: y for name, x in every.items() for part, y in graph_tensors.flatten(name, x.detach()).items()}


def save_module_form(
    model: "ModelMixin",
    save_directory: str | Path,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    **options: Any,
) -> None:
    """``save_pretrained`` of a model in the module form; ``options`` are those of diffusers' method.

    Raises:
        ValueError: the model carries a LoRA, its weights were unpacked, or an option asks for another kind of file.
        OSError: the folder cannot be written.
    """
    refuse_unsaveable(model)
    record, tensors = record_of(model), tensors_to_save(model)
    transformer_folder.check_codes(record, tensors)
    _check_rebuilt(record, tensors)
    save_pretrained(
        model,
        record,
        tensors,
        save_directory,
        is_main_process,
        safe_serialization,
        variant,
        max_shard_size,
        **options,
    )


def _check_rebuilt(record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` if ``tensors`` are not those of the model that will be made from the record."""
    entries = {name: Entry.unchecked(x) for name, x in tensors.items()}
    try:
        slots = Slots(empty_model(record.model), dataclasses.replace(record, tensors=entries))
        added = sorted(set(slots.constants) - set(record.constants))
        problem = f"it has tensor {added[0]} besides" if added else None
    except ValueError as error:
        problem = str(error)
    if problem:
        raise ValueError(
            f"this {record.model['_class_name']} was changed since it was quantized: {problem}; change it before quantizing"
        )


def _fusing_refused(*args: object, **kwargs: object) -> None:
    """Stands for ``fuse_qkv_projections`` of a quantized model."""
    raise ValueError(
        "q, k and v of a quantized model stay apart: they share their quantized input already, and a fused model could not be "
        "saved; leave out fuse_qkv_projections()"
    )


def memory_footprint(model: nn.Module, return_buffers: bool = True) -> int:
    """``get_memory_footprint`` of a quantized model: bytes of its tensors as they are stored.

    Args:
        model: a model with low-bit weights.
        return_buffers: whether buffers count.
    """
    return sum(x.nbytes for x in (*model.parameters(), *(model.buffers() if return_buffers else ())))


def dequantize_modules(model: "ModelMixin") -> "ModelMixin":
    """Turns a model in the module form back into a float model, in place; weights keep their rounded values.

    Raises:
        ValueError: a LoRA is fused, which could not be unfused afterwards.
    """
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("the transformer carries a fused LoRA; call unfuse_lora() or unload_lora() first")
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, TorchAOBaseTensor):
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    unscale_modules(model)
    join_modules(model)
    restore_attention(model.modules())
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    _compat.replace_config(model, type(model.config)(config))
    _compat.replace_apply(model, None)
    for name in ("save_pretrained", "fuse_lora", "unfuse_lora", "get_memory_footprint", "fuse_qkv_projections"):
        vars(model).pop(name, None)
    del model.quantization_method
    return model
