"""A quantized transformer on disk: ``config.json`` and safetensors files, nothing pickled, no float copy of a weight.

``config.json`` is the diffusers config with a ``quantization_config`` beside it (``quantization_record``): format version,
recipe, what became of every layer, versions, a copy of the config, and shape, type and SHA-256 of every tensor. The files
hold, by fully qualified name, packed codes (``….weight.qdata``) and scales (``….weight.scale``), and every other tensor as it
was. The graph form and the module form write the same folder, and read each other's.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fp4dit_ao._registration import METHOD
from fp4dit_ao.checkpoint import graph_rebuilding, tensor_files
from fp4dit_ao.checkpoint.graph_rebuilding import empty_model
from fp4dit_ao.checkpoint.quantization_record import FORMAT_VERSION, Record, check_model
from fp4dit_ao.checkpoint.tensor_files import Entry, first_line
from fp4dit_ao.diffusers_integration import module_form
from fp4dit_ao.tensors.levels import refuse_unpacked
from fp4dit_ao.util.atomic_files import whole_folder

if TYPE_CHECKING:
    from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer

__all__ = ["CONFIG", "empty_model", "is_quantized", "load", "load_modules", "read_config", "save", "save_pretrained"]

CONFIG = "config.json"
SHARD_SIZE = "10GB"
"""diffusers' own limit."""
_OWN = (f"{Path(tensor_files.WEIGHTS).stem}*",)
BUFFER_LIMIT = 1 << 30
"""Bytes of the largest tables, such as those of positions, that a model may make while it is loaded."""


def save(model: nn.Module, folder: str | Path, max_shard_size: int | str = SHARD_SIZE) -> None:
    """Write ``model`` into ``folder``, whole or not at all. A transformer saved there before is replaced.

    Args:
        model: a ``QuantizedTransformer``, or a diffusers model in the module form.
        folder: to write into.
        max_shard_size: of a file, such as ``"5GB"``, or bytes.

    Raises:
        FileExistsError: the folder holds something else.
        ValueError: the model carries a LoRA.
        OSError: it cannot be written.
        ValueError: the weights were unpacked.
    """
    adapters = sorted(name for name, _ in model.named_parameters() if ".lora_" in name)
    if adapters:
        raise ValueError(
            f"the transformer carries a LoRA ({adapters[0]}), which is saved by itself; unload it first, or save it with "
            "save_lora_adapter"
        )
    refuse_unpacked((x for _, x in model.named_parameters()), "saving")
    form = module_form if module_form.is_module_form(model) else graph_rebuilding
    record, tensors = form.record_of(model), form.tensors_to_save(model)
    with whole_folder(folder, replaceable=is_quantized(folder), own=_OWN) as partial:
        metadata = {"quant_method": METHOD, "format_version": str(FORMAT_VERSION)}
        tensor_files.write(tensors, partial, metadata, max_shard_size)
        record.tensors = {name: Entry.of(x) for name, x in tensors.items()}
        config = record.model | {"quantization_config": record.to_json()}
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    safe_serialization: bool = True,
    variant: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    push_to_hub: bool = False,
    use_flashpack: bool = False,
    **hub: Any,
) -> None:
    """:func:`save`, called as diffusers' ``save_pretrained``.

    Raises:
        ValueError: pickles, FlashPack or a variant are asked for.
        OSError: the folder cannot be written.
    """
    if not safe_serialization or use_flashpack:
        raise ValueError(
            "a quantized transformer is saved as safetensors only; leave safe_serialization=True and use_flashpack=False"
        )
    if variant is not None:
        raise ValueError(f"a quantized transformer has no variant {variant!r}; leave variant=None")
    if is_main_process:
        save(model, save_directory, max_shard_size)
    if push_to_hub:
        model.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)


def load(folder: str | Path) -> "QuantizedTransformer":
    """The transformer in ``folder`` as a graph, on the CPU. Its float weights are never made.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a foreign folder, another format version, a truncated or altered file, tensors that do not fit.
    """
    from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer

    folder = Path(folder)
    record = read_record(folder)
    if record.sample is None:
        raise ValueError(f"{folder} does not say how to capture its graph; load it with form='module'")
    stored = dict(tensor_files.read(folder, record.tensors))
    model = _empty(folder, record)
    own = dict(graph_rebuilding.tensors_of(model))
    try:
        dtypes = {name: x.dtype for name, x in stored.items()}
        graph = graph_rebuilding.build(model, record.sample, record.decisions, record.dtype, dtypes)
        read = graph_rebuilding.state_of(graph)
        # a model may also have tensors that it does not use in calls like the captured one
        graph_rebuilding.fill(graph, {name: x for name, x in stored.items() if name in read or name not in own})
    except Exception as error:  # whatever a config that fits nothing makes a model do
        raise ValueError(f"{folder} does not fit its own config: {first_line(error)}") from error
    return QuantizedTransformer(graph, model, record.sample, record.decisions, record.recipe, record.source)


def load_modules(folder: str | Path) -> Any:
    """The transformer in ``folder`` as the diffusers model that it was, on the CPU, in the module form.

    What ``from_pretrained`` of its class gives, in the type that it was saved in.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: as for :func:`load`, or it has static input ranges, which only a graph computes.
    """
    folder = Path(folder)
    record = read_record(folder)
    module_form.check_online(record)
    stored = dict(tensor_files.read(folder, record.tensors))
    model = _empty(folder, record)
    made = [x for name, x in model.named_buffers() if name not in record.tensors]
    if sum(x.nbytes for x in made) > BUFFER_LIMIT:
        raise ValueError(f"{folder} is damaged: its model makes tables larger than any known model's; copy it again")
    if made:
        model = _empty(folder, record, buffers=True)
    try:
        slots = module_form.Slots(model, record)
        for name, x in stored.items():
            slots.put(name, x)
        return module_form.finish(slots.close(), module_form.quantizer_of(record))
    except Exception as error:
        raise ValueError(f"{folder} does not fit its own config: {first_line(error)}") from error


def is_quantized(folder: str | Path) -> bool:
    """Whether ``folder`` is (or was meant to be) a transformer that :func:`save` wrote."""
    try:
        return bool(tensor_files.read_json(Path(folder) / CONFIG)["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a quantized transformer.

    Raises:
        FileNotFoundError: no folder, or no such file in it.
        ValueError: not JSON, or the config of something else.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no saved transformer: it has no {CONFIG}")
    config = tensor_files.read_json(path)
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(quantization, dict) or "quant_method" not in quantization:
        raise ValueError(f"{folder} holds no quantized transformer; load it with diffusers, then use quantize_pipeline")
    return dict(config)


def read_record(folder: str | Path) -> Record:
    """What ``folder`` says of how its transformer was quantized, and must hold.

    Raises:
        FileNotFoundError: no folder, or no ``config.json`` in it.
        ValueError: the config of something else, or an altered one.
    """
    where = str(Path(folder) / CONFIG)
    config = read_config(folder)
    record = Record.from_json(config["quantization_config"], where)
    check_model(record, config, where)
    return record


def _empty(folder: Path, record: Record, buffers: bool = False) -> nn.Module:
    try:
        return empty_model(record.model, limit=100 + 2 * len(record.tensors), buffers=buffers)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
