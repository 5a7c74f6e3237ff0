"""A quantized transformer on disk: ``config.json`` and one safetensors file, nothing pickled, no float copy of a weight.

``config.json`` is the diffusers config with a ``quantization_config`` beside it: format version, recipe, what became of every
layer, the sample that the graph is captured with, and size and SHA-256 of the weights file. That file holds, by fully
qualified name, packed codes (``….weight.qdata``) and scales (``….weight.scale``), and every other tensor as it was. Loading
rebuilds the graph from the config (:mod:`fp4dit_ao.skeleton`) and puts the tensors in.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from fp4dit_ao import skeleton
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.folders import whole_folder
from fp4dit_ao.quantizer import Decision
from fp4dit_ao.unpacked import refuse_unpacked

if TYPE_CHECKING:
    from fp4dit_ao.quantized_transformer import QuantizedTransformer

METHOD = "fp4dit_ao"
FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
_PACKAGES = ("fp4dit-ao", "torch", "torchao", "diffusers")


def save(model: "QuantizedTransformer", folder: str | Path) -> None:
    """Write ``model`` into ``folder``, whole or not at all. A transformer saved there before is replaced.

    Raises:
        FileExistsError: the folder holds something else.
        OSError: it cannot be written.
        ValueError: the weights were unpacked.
    """
    state = skeleton.state_of(model.graph)
    refuse_unpacked(state.values(), "saving")
    tensors = {
        k: v.cpu().contiguous() for name, x in state.items() for k, v in skeleton.flatten(name, x.detach()).items()
    }
    with whole_folder(folder, replaceable=is_quantized(folder)) as partial:
        file = partial / WEIGHTS
        save_file(
            tensors, file, metadata={"format": "pt", "quant_method": METHOD, "format_version": str(FORMAT_VERSION)}
        )
        quantization = _describe(model) | {
            "weights": {"file": WEIGHTS, "bytes": file.stat().st_size, "sha256": _checksum(file)},
        }
        config = dict(model.config) | {"quantization_config": quantization}
        (partial / CONFIG).write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")


def load(folder: str | Path) -> "QuantizedTransformer":
    """The transformer in ``folder``, on the CPU. Its float weights are never made.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a foreign folder, another format version, a truncated or altered file, tensors that do not fit.
    """
    from fp4dit_ao.quantized_transformer import QuantizedTransformer

    folder = Path(folder)
    config = read_config(folder)
    quantization = config["quantization_config"]
    version = quantization.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version}, this fp4dit_ao reads {FORMAT_VERSION}; update fp4dit_ao"
        )
    try:
        decisions = _decisions(quantization["layers"], [QuantConfig.from_dict(c) for c in quantization["configs"]])
        recipe = QuantConfig.from_dict(quantization["recipe"]) if quantization["recipe"] else None
        dtype, sample = _dtype(quantization["dtype"]), quantization["sample"]
        size, checksum = int(quantization["weights"]["bytes"]), str(quantization["weights"]["sha256"])
        source = quantization.get("source")
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise ValueError(f"{folder / CONFIG} is damaged: its quantization_config cannot be read ({error!r})") from error
    file = _verified(folder / WEIGHTS, size, checksum)
    model = empty_model(config)
    try:
        stored = load_file(file)
        dtypes = {name: x.dtype for name, x in stored.items()}
        graph = skeleton.build(model, sample, decisions, dtype, dtypes)
        skeleton.fill(graph, stored)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder} does not fit its own config: {error}") from error
    return QuantizedTransformer(graph, model, sample, decisions, recipe, source)


def is_quantized(folder: str | Path) -> bool:
    """Whether ``folder`` is (or was meant to be) a transformer that :func:`save` wrote."""
    try:
        data = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
        return bool(data["quantization_config"]["quant_method"] == METHOD)
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
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON ({error})") from error
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method is None:
        raise ValueError(f"{folder} holds no quantized transformer; load it with diffusers, then use quantize_pipeline")
    if method != METHOD:
        raise ValueError(f"{folder} was quantized by {method}, not by {METHOD}; load it with diffusers")
    return dict(config)


def empty_model(config: dict[str, Any]) -> nn.Module:
    """The float model that ``config`` describes, on the meta device.

    Raises:
        ValueError: diffusers has no such model class, or it does not take this config.
    """
    import diffusers

    name = config.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise ValueError(f"diffusers {diffusers.__version__} has no model class {name!r}; install a version that does")
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    try:
        with torch.device("meta"):
            model: nn.Module = cls.from_config(plain).eval()  # type: ignore[attr-defined]
            return model
    except Exception as error:
        raise ValueError(f"{name} cannot be made from its config: {error}") from error


# --- quantization_config ---------------------------------------------------------------------------------------------


def _describe(model: "QuantizedTransformer") -> dict[str, Any]:
    configs: list[QuantConfig] = []
    layers = []
    for decision in model.decisions:
        if decision.config is not None and decision.config not in configs:
            configs.append(decision.config)
        index = None if decision.config is None else configs.index(decision.config)
        layers.append({"name": decision.name, "kind": decision.kind, "config": index, "reason": decision.reason})
    return {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "recipe": dataclasses.asdict(model.recipe) if model.recipe else None,
        "source": model.source,
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "dtype": str(model.dtype).removeprefix("torch."),
        "sample": model.description,
        "configs": [dataclasses.asdict(config) for config in configs],
        "layers": layers,
    }


def _decisions(layers: list[dict[str, Any]], configs: list[QuantConfig]) -> list[Decision]:
    return [
        Decision(
            layer["name"], layer["kind"], None if layer["config"] is None else configs[layer["config"]], layer["reason"]
        )
        for layer in layers
    ]


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verified(path: Path, size: int, checksum: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; copy the whole folder again")
    found = path.stat().st_size
    if found < size:
        raise ValueError(f"{path} is truncated: {found:,} of {size:,} bytes; copy it again")
    if found > size or _checksum(path) != checksum:
        raise ValueError(f"{path} was altered since it was saved: its SHA-256 is not the recorded one; copy it again")
    return path
