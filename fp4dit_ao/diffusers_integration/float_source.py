"""Checks of a float model before it is quantized: it is what its config rebuilds, and its weights are floats at hand."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.families.lookup import check_not_compiled

if TYPE_CHECKING:
    from diffusers import ModelMixin

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types whose values are the weight, without a scale beside them."""

_REMEDIES = (
    ((".lora_", ".base_layer."), "it carries a LoRA: call unload_lora() or unload_lora_weights(); what is fused stays"),
    ((".to_qkv", ".to_kv", ".to_added_qkv"), "its projections are fused: call unfuse_qkv_projections()"),
    ((".processor.", "encoder_hid_proj"), "it carries an IP-Adapter: call unload_ip_adapter(), and load it afterwards"),
)  # fmt: skip
"""Changes of a model's tensors and the call that undoes each, by a part of the names of the tensors that it adds."""


def check_source(model: "ModelMixin") -> None:
    """Raises ``ValueError`` if ``model`` could not be loaded again once it is quantized, or its linears hold no floats.

    Args:
        model: a float diffusers model.
    """
    kind = type(model).__name__
    check_not_compiled(model)
    if "quantization_config" in getattr(model, "config", {}) or kind == "QuantizedTransformer":
        raise ValueError(f"this {kind} is already quantized; start from the float model")
    _check_layout(model)
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear) and isinstance(weight, Tensor):
            check_weight(f"{name}.weight", weight)


def check_weight(name: str, weight: Tensor) -> None:
    """Raises ``ValueError`` if ``weight`` is no float weight that can be read."""
    kind = type(weight.detach()).__name__
    if weight.is_meta:
        raise ValueError(
            f"{name} is on the meta device: quantize the model before it is offloaded, or load its weights"
        )
    if weight.dtype not in FLOATS or kind != "Tensor":
        found = f"a {kind}, of another quantization" if kind != "Tensor" else str(weight.dtype)
        raise ValueError(
            f"{name} is {found}; expected float32, bfloat16 or float16: load the model without its quantization and without "
            "layerwise casting, such as with torch_dtype=torch.bfloat16"
        )


def widened(name: str, weight: Tensor, dtype: torch.dtype, others: Iterable[str] = ()) -> Tensor:
    """``weight`` as read from a file, in ``dtype`` if it is stored in FP8.

    Args:
        name: name of the weight.
        weight: its tensor.
        dtype: float type to widen FP8 to.
        others: names of tensors in the file that the model does not have.

    Raises:
        ValueError: it is stored in another type that is no float, or with a scale beside it, which would be ignored.
    """
    if weight.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        scale = next((other for other in others if "scale" in other.rpartition(".")[2]), None)
        if scale is not None:
            raise ValueError(
                f"{name} is {weight.dtype} and its file has scales beside it ({scale}), which diffusers does not read; use a "
                "checkpoint in bfloat16"
            )
        weight = weight.to(dtype)
    check_weight(name, weight)
    return weight


def _check_layout(model: "ModelMixin") -> None:
    try:
        expected = {
            name: tuple(x.shape) for name, x in empty_model(dict(model.config), cls=type(model)).state_dict().items()
        }
    except ValueError:
        return  # a class that cannot be made from its config can be quantized, but not be saved
    if found := difference({name: tuple(x.shape) for name, x in model.state_dict().items()}, expected):
        raise ValueError(f"this {type(model).__name__} is not what its config describes: {found}")


def difference(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> str | None:
    """First difference between names and shapes of tensors, with what undoes it; None if there is none."""
    added = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    for parts, remedy in _REMEDIES:
        if any(part in f".{name}" for name in added for part in parts):
            return f"{remedy} (tensor {next(n for n in added if any(part in f'.{n}' for part in parts))})"
    if added or missing:
        what = f"{added[0]} is added" if added else f"{missing[0]} is missing"
        return f"tensor {what}; use it as from_pretrained loads it"
    changed = next((name for name in found if found[name] != expected[name]), None)
    return changed and f"{changed} is {found[changed]}, not {expected[changed]}; use it as from_pretrained loads it"
