"""Quantized transformer on disk: ``config.json`` and safetensors files, without pickles and without float weights.

``config.json`` is the diffusers config with a ``quantization_config`` beside it (``quantization_record``): format
version, recipe, decision for every layer, versions, a copy of the config, and shape, type and SHA-256 of every tensor.
The files hold, by fully qualified name, packed codes (``….weight.qdata``) and scales (``….weight.scale``), and all
other tensors unchanged. The graph form and the module form write the same folder, and read each other's.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fp4dit_ao._registration import METHOD
from fp4dit_ao.checkpoint import tensor_files
from fp4dit_ao.checkpoint.empty_model import empty_model
from fp4dit_ao.checkpoint.quantization_record import Record, check_model
from fp4dit_ao.checkpoint.tensor_files import Entry
from fp4dit_ao.passes.graph_products import weight_named
from fp4dit_ao.util.atomic_files import whole_folder

CONFIG = "config.json"

SHARD_SIZE = "10GB"
"""Default limit of one file, the same as in diffusers."""

_OWN = (f"{Path(tensor_files.WEIGHTS).stem}*",)


def save(
    record: Record, tensors: Mapping[str, Tensor], folder: str | Path, max_shard_size: int | str = SHARD_SIZE
) -> None:
    """Writes a quantized transformer into ``folder``, whole or not at all; one that was saved there before is replaced.

    Args:
        record: how it was quantized; its ``tensors`` are set to the entries that are written.
        tensors: plain tensors, by name.
        folder: folder to write into.
        max_shard_size: limit of one file, such as ``"5GB"`` or a number of bytes.

    Raises:
        ValueError: a quantized weight is a float tensor now, or a tensor is on the meta device.
        FileExistsError: the folder holds something else.
        OSError: the folder cannot be written.
    """
    check_codes(record, tensors)
    away = next((name for name, x in tensors.items() if x.is_meta), None)
    if away is not None:
        raise ValueError(
            f"{away} is on the meta device, as weights are while they are offloaded one by one: call pipe.remove_all_hooks() "
            "before saving"
        )
    with whole_folder(folder, replaceable=is_quantized(folder), own=_OWN) as partial:
        metadata = {"quant_method": METHOD, "format_version": str(record.format_version)}
        tensor_files.write(tensors, partial, metadata, max_shard_size)
        record.tensors = {name: Entry.of(x) for name, x in tensors.items()}
        config = record.model | {"quantization_config": record.to_json()}
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_codes(record: Record, tensors: Mapping[str, Tensor]) -> None:
    """Raises ``ValueError`` if a weight that the record calls quantized is a float tensor, and could not be loaded again."""
    for decision in record.decisions:
        weight = weight_named(tensors, decision.name)
        if decision.kind == "linear" and decision.config is not None and weight is not None:
            raise ValueError(
                f"{decision.name} was quantized to {decision.config.weight}, and its weight is {weight.dtype} now, as after "
                "load_state_dict(…, assign=True): load other weights into the float model, and quantize that"
            )


def is_quantized(folder: str | Path) -> bool:
    """Whether the ``config.json`` in ``folder`` is that of a transformer that :func:`save` wrote, damaged or not."""
    try:
        config = tensor_files.read_json(Path(folder) / CONFIG)
    except (OSError, ValueError):
        return False
    return _quantization(config).get("quant_method") == METHOD


def _quantization(config: object) -> dict[str, object]:
    """The ``quantization_config`` in the content of a ``config.json``; empty if there is none."""
    found = config.get("quantization_config") if isinstance(config, dict) else None
    return found if isinstance(found, dict) else {}


def read_config(folder: str | Path) -> dict[str, object]:
    """Reads ``config.json`` of a quantized transformer.

    Raises:
        FileNotFoundError: there is no folder, or no such file in it.
        ValueError: the file is not JSON, or the config of something else.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no saved transformer: it has no {CONFIG}")
    config = tensor_files.read_json(path)
    if not isinstance(config, dict) or "quant_method" not in _quantization(config):
        raise ValueError(f"{folder} holds no quantized transformer; load it with diffusers, then use quantize_pipeline")
    return config


def read_record(folder: str | Path) -> Record:
    """Reads the quantization record in ``folder``, and checks it against the config.

    Raises:
        FileNotFoundError: there is no folder, or no ``config.json`` in it.
        ValueError: the config is that of something else, or was altered.
    """
    where = str(Path(folder) / CONFIG)
    config = read_config(folder)
    record = Record.from_json(_quantization(config), where)
    check_model(record, config, where)
    return record


def empty_model_of(folder: Path, record: Record, buffers: bool = False) -> nn.Module:
    """Float model of the transformer in ``folder``, on the meta device.

    Args:
        folder: folder of the transformer, for messages.
        record: its quantization record.
        buffers: whether buffers get real values, as the model initialises them.

    Raises:
        ValueError: the model cannot be made from its config, or has more parameters than are stored.
    """
    try:
        return empty_model(record.model, limit=100 + 2 * len(record.tensors), buffers=buffers)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
