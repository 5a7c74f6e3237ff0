"""Calibration samples on disk: one safetensors file per combination of weights, prompts and settings."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fp4dit_ao.graph_capture.sample_description import decode_arguments, encode
from fp4dit_ao.util.atomic_files import whole_file

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Sample = dict[str, object]
"""Keyword arguments of one ``forward``."""

_VERSION = 1
_PROBES = 4096


def fingerprint(pipe: "DiffusionPipeline", settings: Mapping[str, object], arguments: Mapping[str, object]) -> str:
    """Cache key: a hash of everything that determines the samples.

    Of each weight the name, shape, type and up to 4096 evenly spaced values are hashed, so that a 10 GB text encoder
    need not be read in full.
    """
    digest = hashlib.sha256(f"{_VERSION} {type(pipe).__name__}".encode())
    for name, component in sorted(pipe.components.items()):
        config: object = getattr(component, "config", None)
        config = config.to_dict() if hasattr(config, "to_dict") else config
        digest.update(f"{name} {type(component).__name__} {json.dumps(config, sort_keys=True, default=str)}".encode())
        # the autoencoder decodes images; samples do not depend on it
        if isinstance(component, nn.Module) and name != "vae":
            for key, value in component.state_dict().items():
                digest.update(key.encode())
                _add(digest, value)
    digest.update(json.dumps(dict(settings), sort_keys=True, default=str).encode())
    for name, argument in sorted(arguments.items()):
        digest.update(name.encode())
        if isinstance(argument, Tensor):
            _add(digest, argument, full=True)
        else:
            digest.update(repr(argument).encode())
    return digest.hexdigest()[:24]


def _add(digest: "hashlib._Hash", x: Tensor, full: bool = False) -> None:
    digest.update(f"{tuple(x.shape)} {x.dtype}".encode())
    flat = x.detach().flatten()
    step = 1 if full else max(1, flat.numel() // _PROBES)
    digest.update(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes() if flat.numel() else b"")


def path_of(folder: str | Path, key: str) -> Path:
    """File of the samples stored under ``key``."""
    return Path(folder) / f"samples-{key}.safetensors"


def load(folder: str | Path, key: str, device: torch.device) -> list[Sample] | None:
    """Loads the samples stored under ``key`` to ``device``; None if there are none, or, with a warning, if the file is
    damaged."""
    path = path_of(folder, key)
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            structure = json.loads((file.metadata() or {})["samples"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
            return [decode_arguments(sample, lambda name: tensors[name]) for sample in structure]
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        warnings.warn(f"ignoring the damaged calibration cache {path} ({error}); collecting anew", stacklevel=3)
        return None


def save(folder: str | Path, key: str, samples: Sequence[Sample]) -> None:
    """Stores ``samples`` under ``key``, whole or not at all; tensors that samples share are stored once.

    Raises:
        OSError: the folder cannot be written.
    """
    names: dict[tuple[object, ...], str] = {}
    stored: dict[str, Tensor] = {}

    def store(x: Tensor) -> str:
        identity = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
        if identity not in names:
            names[identity] = f"tensor{len(names)}"
            stored[names[identity]] = x.detach().cpu().contiguous().clone()
        return names[identity]

    structure = [encode(sample, store, f"sample {index}") for index, sample in enumerate(samples)]
    try:
        with whole_file(path_of(folder, key)) as partial:
            save_file(stored, partial, metadata={"samples": json.dumps(structure)})
    except OSError as error:
        raise OSError(f"cannot keep calibration data in {folder}: {error}") from error
