"""``save_pretrained`` of quantized transformers in either form."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fp4dit_ao.checkpoint import transformer_folder
from fp4dit_ao.checkpoint.quantization_record import Record
from fp4dit_ao.checkpoint.transformer_folder import SHARD_SIZE
from fp4dit_ao.passes.weight_unpacking import refuse_unpacked

if TYPE_CHECKING:
    from diffusers import ModelMixin


def refuse_unsaveable(model: nn.Module) -> None:
    """Raises ``ValueError`` if ``model`` carries a LoRA, or weights that were unpacked."""
    adapters = sorted(name for name, _ in model.named_parameters() if ".lora_" in name)
    if adapters:
        raise ValueError(
            f"the transformer carries a LoRA ({adapters[0]}), which is saved by itself; unload it first, or save it with "
            "save_lora_adapter"
        )
    refuse_unpacked(model, "saving")


def save_pretrained(
    model: "ModelMixin",
    record: Record,
    tensors: Mapping[str, Tensor],
    save_directory: str | Path,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    push_to_hub: bool = False,
    use_flashpack: bool = False,
    **hub: Any,
) -> None:
    """Writes a quantized transformer, with the arguments of diffusers' ``save_pretrained``.

    Args:
        model: the model; its ``push_to_hub`` is called if requested.
        record: how the model was quantized.
        tensors: its plain tensors, by name.

    Raises:
        ValueError: pickles, FlashPack or a variant are requested.
        OSError: the folder cannot be written.
    """
    if not safe_serialization or use_flashpack:
        raise ValueError(
            "a quantized transformer is saved as safetensors only; leave safe_serialization=True and use_flashpack=False"
        )
    if variant is not None:
        raise ValueError(f"a quantized transformer has no variant {variant!r}; leave variant=None")
    if is_main_process:
        transformer_folder.save(record, tensors, save_directory, max_shard_size)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)
