"""State of a run that was interrupted: tensors and texts in one safetensors file, with a checksum of both."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fp4dit_ao.util.atomic_files import whole_file

_CHECKSUM = "sha256"


def save_state(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Writes ``tensors`` and ``texts`` to ``path``, whole or not at all.

    Raises:
        OSError: the file cannot be written (permissions, disk full); one sentence, which says that earlier files are kept.
    """
    own = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    try:
        with whole_file(path) as partial:
            save_file(own, partial, {**texts, _CHECKSUM: _digest(own, texts)})
    except OSError as error:
        raise OSError(
            f"{error}; what was finished before is kept in {path.parent}: make room, and start the same run again"
        ) from error


def load_state(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads what :func:`save_state` wrote: tensors and texts.

    Args:
        path: the file.
        remedy: end of the message if it is damaged.

    Raises:
        ValueError: the file is damaged, or was altered.
    """
    try:
        with safe_open(path, "pt") as file:
            texts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is broken ({error}); {remedy}") from error
    if texts.pop(_CHECKSUM, None) != _digest(tensors, texts):
        raise ValueError(f"{path} is broken (its SHA-256 is not the recorded one); {remedy}")
    return tensors, texts


def _digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(texts), sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(bytes_of(x))
    return digest.hexdigest()


def bytes_of(x: Tensor) -> memoryview:
    """Bytes of a tensor's elements in order, wherever and however it is stored; hashes take them."""
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
