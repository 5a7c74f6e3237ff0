"""The module form: a diffusers model stays what it is, and its linears' weights become ``MinifloatTensor``.

The graph form (:func:`fp4dit_ao.lower`) computes the same; this one keeps the module hierarchy, and with it LoRA, offloading,
``.to()`` and whatever else looks for modules. q, k and v are quantized by wrapped attention processors.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchao.utils import TorchAOBaseTensor

from fp4dit_ao import _compat
from fp4dit_ao.checkpoint import graph_rebuilding
from fp4dit_ao.checkpoint.quantization_record import Record, model_config
from fp4dit_ao.checkpoint.tensor_files import Entry
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.diffusers_integration import lora
from fp4dit_ao.diffusers_integration.attention_processors import quantize_attention, restore_attention
from fp4dit_ao.families import example_inputs, family_of, quantizer_for, recipe_for
from fp4dit_ao.graph_capture import sample_description
from fp4dit_ao.graph_capture.capturing import bind
from fp4dit_ao.passes.device_placement import convert_tensors
from fp4dit_ao.passes.transforms.split_inputs import part_sizes, split_modules
from fp4dit_ao.quantizer import Decision, FP4DiTQuantizer, fit_group
from fp4dit_ao.schemes.low_bit_weight import empty_parts, from_parts, low_bit_weight


def quantize_modules(
    model: Any,
    recipe: str | QuantConfig = "w4a6",
    *,
    skip: Sequence[str] = (),
    sample: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> Any:
    """Quantize a diffusers model in place with nearest rounding: no graph to run, no calibration, one weight at a time.

    Args:
        model: the float model.
        recipe: a name in ``config.RECIPES``, taken as it is for the model's family; or a config, taken as it is.
        skip: globs over module names that stay in high precision, besides the recipe's own.
        sample: keyword arguments of one ``forward``; of a family that the package knows, it makes them up. With them the
            linears before a gate are found in the model's graph.
        source: name or path of the float model, to be written down.

    Returns:
        ``model``; its ``save_pretrained`` writes what ``from_pretrained`` and ``load_pipeline`` read.

    Raises:
        ValueError: an unknown recipe, one that needs calibration data, or a model that it does not fit.
    """
    from fp4dit_ao.diffusers_integration.hf_quantizer import FP4DiTConfig, FP4DiTDiffusersQuantizer

    record = decide(model, recipe, skip=skip, sample=sample, source=source)
    split_modules(model, record.parts)
    for name, config in quantized_linears(record):
        quantize_linear(model, name, config)
    quantizer = FP4DiTDiffusersQuantizer(FP4DiTConfig(recipe, skip=skip), record, pre_quantized=False)
    return finish(model, quantizer)


def decide(
    model: Any,
    recipe: str | QuantConfig = "w4a6",
    *,
    skip: Sequence[str] = (),
    sample: Mapping[str, Any] | None = None,
    source: str | None = None,
) -> Record:
    """What :func:`quantize_modules` would do with ``model``, whose tensors may be on the meta device; nothing is changed."""
    config = recipe_for(model, recipe)
    asked = recipe if isinstance(recipe, str) else config
    if config.activation_granularity == "tensor":
        raise ValueError(
            f"recipe {asked} needs calibration data for static input ranges, which only the graph form computes; "
            "use quantize_pipeline, or a recipe that quantizes inputs online"
        )
    if config.weight_candidates:
        raise ValueError(
            f"recipe {asked} needs calibration data; use quantize_pipeline, then load_pipeline(…, form='module')"
        )
    quantizer = quantizer_for(model, recipe)
    for glob in skip:
        quantizer.set_module_name(glob, None)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if sample is None and family_of(model).sample is not None:
        sample = example_inputs(model, dtype=dtype)
    description, parts = None, {}
    if sample is None:
        decisions = _decisions_by_name(model, quantizer)
    else:
        description = sample_description.describe(bind(model, sample))
        empty = graph_rebuilding.empty_model(dict(model.config), cls=type(model))
        prepared = graph_rebuilding.prepare(empty, description, dtype, quantizer)
        decisions = graph_rebuilding.resolve(quantizer.decisions.values(), prepared)
        parts = part_sizes(prepared.named_parameters())
    record = Record(decisions, dtype, config, source, description, parts)
    if not any(True for _ in quantized_linears(record)):
        raise ValueError(f"nothing in this {type(model).__name__} would be quantized; check the skip globs")
    return record


def quantize_linear(model: Any, name: str, config: QuantConfig) -> None:
    """Round the weight of a linear to nearest, in place.

    Raises:
        ValueError: NaN or Inf in it, or a group size that does not divide it.
    """
    linear = model.get_submodule(name)
    linear.weight = nn.Parameter(low_bit_weight(name, linear.weight, config), requires_grad=False)


def check_online(record: Record) -> None:
    """Raise ``ValueError`` if something was quantized in a way that only a graph can execute."""
    for decision in record.decisions:
        if decision.config is not None and decision.config.activation_granularity == "tensor":
            raise ValueError(
                f"{decision.name} quantizes its input in a static range, which only the graph form computes; use "
                "form='graph', or a recipe that quantizes inputs online"
            )


def quantized_linears(record: Record) -> Iterable[tuple[str, QuantConfig]]:
    """(name, config) of every linear with a low-bit weight.

    Raises:
        ValueError: a config that only a graph can execute.
    """
    check_online(record)
    for decision in record.decisions:
        if decision.config is not None and decision.kind == "linear":
            yield decision.name, decision.config


def finish(model: Any, quantizer: Any) -> Any:
    """Wrap attention processors, and let ``model`` save itself in this package's format.

    Args:
        model: with its linears quantized.
        quantizer: an ``FP4DiTDiffusersQuantizer`` with the record of what was done.
    """
    from fp4dit_ao.checkpoint.transformer_folder import save_pretrained

    for decision in quantizer.record.decisions:
        if decision.kind == "attention" and decision.config is not None and decision.config.attention is not None:
            name = decision.name.partition("#")[0]  # one decision for each call inside of one module
            quantize_attention(model.get_submodule(name), decision.config.attention, name)
    model.hf_quantizer = quantizer
    model.quantization_method = quantizer.quantization_config.quant_method
    model.is_quantized = False  # diffusers refuses .to(dtype) where this is True; here that casts what is not quantized
    model.register_to_config(quantization_config=quantizer.quantization_config)
    if not getattr(model, "_repeated_blocks", None):  # what compile_repeated_blocks() compiles
        blocks = (block for module in model.children() if isinstance(module, nn.ModuleList) for block in module)
        model._repeated_blocks = sorted({type(block).__name__ for block in blocks})
    model.save_pretrained = functools.partial(save_pretrained, model)
    model.fuse_lora = functools.partial(lora.fuse_lora, model, dict(quantized_linears(quantizer.record)))
    model.unfuse_lora = functools.partial(lora.unfuse_lora, model)
    model._apply = functools.partial(_apply, model)
    return model.eval()


def quantizer_of(record: Record) -> Any:
    """The diffusers quantizer of a model that was quantized as ``record`` says."""
    from fp4dit_ao.diffusers_integration.hf_quantizer import FP4DiTConfig, FP4DiTDiffusersQuantizer

    return FP4DiTDiffusersQuantizer(FP4DiTConfig(record.recipe or "w4a6"), record=record)


def from_graph(transformer: Any) -> Any:
    """A ``QuantizedTransformer`` in the module form; tensors are shared, learned roundings included.

    Raises:
        ValueError: it has static input ranges, which only the graph form computes.
    """
    record = graph_rebuilding.record_of(transformer)
    tensors = graph_rebuilding.tensors_to_save(transformer)
    record.tensors = {name: Entry.unchecked(x) for name, x in tensors.items()}
    slots = Slots(graph_rebuilding.empty_model(record.model, buffers=True), record)
    for name, x in tensors.items():
        slots.put(name, x)
    return finish(slots.close(), quantizer_of(record))


def _apply(model: Any, convert: Any, recurse: bool = True) -> Any:
    """``nn.Module._apply``, which otherwise fails on weights that a compiled model holds weak references to."""
    convert_tensors(model, convert)
    return model


def is_module_form(model: Any) -> bool:
    """Whether ``model`` is a diffusers model whose linears this package quantized."""
    return getattr(getattr(model, "hf_quantizer", None), "record", None) is not None


def record_of(model: Any) -> Record:
    """How a model in the module form was quantized, with its config and dtype as they are now.

    Raises:
        ValueError: it is not quantized.
    """
    if not is_module_form(model):
        raise ValueError(f"this {type(model).__name__} was not quantized by fp4dit_ao")
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    own = model_config(dict(model.config) | {"_class_name": type(model).__name__})
    record: Record = model.hf_quantizer.record
    float_model = None if model.hf_quantizer.pre_quantized else model.config.get("_name_or_path")
    source = record.source or (str(float_model) if float_model else None)
    return dataclasses.replace(record, dtype=dtype, model=own, source=source)


def tensors_to_save(model: Any) -> dict[str, Tensor]:
    """Every tensor of a model in the module form, by the name that it has in a graph; codes and scales apart."""
    every = dict(model.named_parameters()) | dict(model.named_buffers()) | model.hf_quantizer.record.constants
    return {part: y for name, x in every.items() for part, y in graph_rebuilding.flatten(name, x.detach()).items()}


def dequantize_modules(model: Any) -> Any:
    """The float model again, in place, with weights as they were rounded.

    Raises:
        ValueError: a LoRA is fused, which could not be undone any more.
    """
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("the transformer carries a fused LoRA; call unfuse_lora() or unload_lora() first")
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, TorchAOBaseTensor):
            module.weight = nn.Parameter(weight.dequantize(), requires_grad=False)
    restore_attention(model.modules())
    model._internal_dict = type(model.config)({k: v for k, v in model.config.items() if k != "quantization_config"})
    del model.save_pretrained, model.fuse_lora, model.unfuse_lora, model.quantization_method, model._apply
    return model


# --- what to quantize ------------------------------------------------------------------------------------------------


def _decisions_by_name(model: Any, quantizer: FP4DiTQuantizer) -> list[Decision]:
    """Of a model whose graph nobody can capture: every ``nn.Linear`` and every attention module, by the quantizer's rules."""
    decisions = []
    for name, module in model.named_modules():
        kind: Any = "linear" if isinstance(module, nn.Linear) else "attention" if hasattr(module, "processor") else None
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


# --- filling a model with stored tensors -----------------------------------------------------------------------------


class Slots:
    """A float model, opened so that its state dict has the names of stored tensors, until it is closed.

    Args:
        model: on the meta device; changed: every quantized weight becomes a module of codes and scales.
        record: what will be put in.

    Raises:
        ValueError: the record is not one of such a model.
    """

    def __init__(self, model: Any, record: Record):
        self.model, self.record = model, record
        split_modules(model, record.parts)
        self._linears = dict(quantized_linears(record))
        for name, config in self._linears.items():
            self._open(name, config)
        self._constants = sorted(set(record.tensors) - set(dict(graph_rebuilding.tensors_of(model))))
        for name in self._constants:  # tensors that a graph has, and its model makes anew in every call
            entry = record.tensors[name]
            x = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device="meta")
            model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], x)
        self._transient = _compat.make_buffers_persistent(model, set(record.tensors))
        self._waiting = dict.fromkeys(model.state_dict())
        missing = [name for name in self._waiting if name not in record.tensors]
        if missing:
            raise ValueError(f"it lacks tensor {missing[0]} of {type(model).__name__} ({len(missing)} in all)")
        for name, x in model.state_dict().items():
            if tuple(x.shape) != record.tensors[name].shape:
                raise ValueError(
                    f"tensor {name} is {record.tensors[name].shape}, where {type(model).__name__} has {tuple(x.shape)}"
                )

    def _open(self, name: str, config: QuantConfig) -> None:
        try:
            linear = self.model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{type(self.model).__name__} has no linear {name}, which was quantized")
        parts = nn.Module()
        for part, x in empty_parts(linear.weight.shape, config).items():
            parts.register_buffer(part, x)
        del linear.weight
        linear.add_module("weight", parts)

    def put(self, name: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
        """Put ``x``, one of the record's tensors, in its place, as ``dtype`` unless it is quantized or whole numbers."""
        quantized = name.rpartition(".weight.")[0] in self._linears
        if dtype is not None and x.is_floating_point() and not quantized:
            x = x.to(dtype)
        graph_rebuilding.put_tensor(self.model, name, x)
        self._waiting.pop(name, None)

    def close(self, dtype: torch.dtype | None = None) -> Any:
        """The model in the module form, but for what :func:`finish` does.

        Args:
            dtype: that quantized weights present themselves as; the record's if None.

        Raises:
            ValueError: not everything was put in.
        """
        if self._waiting:
            raise ValueError(
                f"tensor {next(iter(self._waiting))} is missing ({len(self._waiting)} in all); copy the folder again"
            )
        for name, config in self._linears.items():
            linear = self.model.get_submodule(name)
            parts = dict(linear.weight.named_buffers())  # type: ignore[union-attr,operator]
            del linear.weight
            weight = from_parts(parts, config, dtype or self.record.dtype)
            linear.weight = nn.Parameter(weight, requires_grad=False)
        _compat.make_buffers_transient(self._transient)
        for name in self._constants:
            self.record.constants[name] = graph_rebuilding.tensor_at(self.model, name)
            delattr(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        return self.model
