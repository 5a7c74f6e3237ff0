"""Fusing a LoRA into low-bit weights: its product is added to their values, and the sum is rounded again.

PEFT's own merging supports only torchao's configs and unmerges by subtracting; here unfusing restores the former codes.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fp4dit_ao.config import QuantConfig
from fp4dit_ao.passes.transforms.scaled_linear import INPUT_SCALE
from fp4dit_ao.passes.transforms.split_inputs import SplitLinear, part_name, whole_name
from fp4dit_ao.passes.transforms.transformed_linear import TransformedLinear
from fp4dit_ao.passes.weight_unpacking import refuse_unpacked
from fp4dit_ao.schemes import scheme_of

if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft.tuners.tuners_utils import BaseTunerLayer


def fuse_lora(
    model: "ModelMixin",
    configs: dict[str, QuantConfig],
    lora_scale: float = 1.0,
    safe_fusing: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    """``fuse_lora`` of a model in the module form: rounds the sums to nearest, in the format and groups of each weight.

    A fused LoRA costs no time, but one more rounding error. The former codes are kept for :func:`unfuse_lora`. A fused
    LoRA stays after ``unload_lora``, and is saved with the model.

    Args:
        model: a model with one or more LoRAs loaded.
        configs: configs of its low-bit linears, by name.
        lora_scale: factor of every LoRA.
        safe_fusing: as in diffusers; low-bit weights always refuse NaN and Inf.
        adapter_names: LoRAs to fuse; the active ones if None.

    Raises:
        ValueError: weights were unpacked, or a LoRA does more than add a product (aLoRA, …).
    """
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    refuse_unpacked(model, "fusing a LoRA")
    layers: list[tuple[str, Any]] = [
        (n, layer) for n, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)
    ]
    wholes = {whole_name(name) for name in configs}
    for name, layer in layers:
        if name in wholes:
            variants = getattr(layer, "lora_variant", {})
            if not isinstance(layer, LoraLayer) or variants:
                kind = next((type(variant).__name__ for variant in variants.values()), type(layer).__name__)
                raise ValueError(f"{name} carries {kind}, which cannot be fused into low-bit weights; leave it unfused")
    for name, layer in layers:
        if name in wholes:
            layer.merge = functools.partial(_merge, layer, name, configs)
            layer.unmerge = functools.partial(_unmerge, layer, name)
        if lora_scale != 1.0:
            layer.scale_layer(lora_scale)
        layer.merge(safe_merge=safe_fusing, adapter_names=adapter_names)


def unfuse_lora(model: "ModelMixin") -> None:
    """Undoes :func:`fuse_lora`: low-bit weights get their former codes and scales back, bit for bit."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            layer.unmerge()


def add_checked(
    model: "ModelMixin", method: str, refused: Mapping[str, str], *args: object, **kwargs: object
) -> object:
    """Calls one of the model's methods that add a LoRA, and refuses LoRAs on linears that a transform changed.

    Args:
        model: a model in the module form.
        method: ``"load_lora_adapter"`` or ``"add_adapter"``, a method of its class.
        refused: why no LoRA of the float model may change a linear, by its name.
        *args: arguments of the method.
        **kwargs: further ones.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    before = set(getattr(model, "peft_config", {}))
    result: object = getattr(type(model), method)(model, *args, **kwargs)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    reasons = {name: refused.get(name) or _no_weight_for_dora(layer) for name, layer in layers.items()}
    for name in filter(reasons.get, reasons):
        model.delete_adapters(sorted(set(model.peft_config) - before))
        if not before:
            model.unload_lora()
        raise ValueError(
            f"this LoRA would compute something else than in the float model: it changes {name}, {reasons[name]}"
        )
    return result


def _no_weight_for_dora(layer: "BaseTunerLayer") -> str | None:
    """Why a DoRA cannot take norms of the rows of this layer's weight: they would not be those of the float model."""
    parts = layer.get_base_layer().modules()
    changed = any(isinstance(part, TransformedLinear) or hasattr(part, INPUT_SCALE) for part in parts)
    if changed and any(getattr(layer, "use_dora", {}).values()):
        return "whose stored weight is what a transform made of it, and a DoRA divides by norms of the weight"
    return None


@torch.no_grad()
def _merge(
    layer: Any,
    name: str,
    configs: dict[str, QuantConfig],
    safe_merge: bool = False,
    adapter_names: list[str] | None = None,
) -> None:
    from peft.tuners.tuners_utils import check_adapters_to_merge

    wanted = [adapter for adapter in check_adapters_to_merge(layer, adapter_names) if adapter in layer.lora_A]
    if not wanted:
        return
    base = layer.get_base_layer()
    former = {part: linear.weight.detach() for part, linear, _ in _columns(name, base)}
    deltas = [_of_scaled_input(layer.get_delta_weight(adapter).float(), base) for adapter in wanted]
    for part, linear, columns in _columns(name, base):
        weight, quantized = former[part], part in configs
        total = weight.dequantize(torch.float32) if quantized else weight.float()
        for delta in deltas:
            total = total + _of_scaled_input(delta[:, columns].to(total), linear)
        if quantized:
            total = scheme_of(configs[part]).round_to_nearest(part, total, configs[part])
        linear.weight = nn.Parameter(total.to(weight.dtype), requires_grad=False)
    if not layer.merged:
        layer.unfused_weights = former
    layer.merged_adapters.extend(wanted)


def _columns(name: str, base: nn.Module) -> Iterator[tuple[str, Any, slice]]:
    """Linears that hold the weight of ``base``, by name, and which of its input features each has."""
    if not isinstance(base, SplitLinear):
        yield name, base, slice(None)
        return
    start = 0
    for index, (linear, size) in enumerate(zip(base.parts, base.sizes, strict=True)):
        yield part_name(name, index), linear, slice(start, start + size)
        start += size


def _of_scaled_input(delta: Tensor, linear: nn.Module) -> Tensor:
    """The change of a weight whose input is multiplied before; that of a LoRA is not."""
    scale: Tensor | None = getattr(linear, INPUT_SCALE, None)
    return delta if scale is None else delta / scale.to(delta)


def _unmerge(layer: Any, name: str) -> None:
    base = layer.get_base_layer()
    if layer.merged:
        for part, linear, _ in _columns(name, base):
            former = layer.unfused_weights[part].to(device=linear.weight.device, dtype=linear.weight.dtype)
            linear.weight = nn.Parameter(former, requires_grad=False)
        layer.merged_adapters.clear()
        del layer.unfused_weights
