"""Single files of weights, as authors publish them: from this machine first."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


def weight_file(name: str, remedy: str) -> Path:
    """A file, or ``owner/repository/file`` of the hub: from its cache, then from the hub.

    Raises:
        OSError: it is not here and cannot be fetched; the message ends with ``remedy``.
    """
    from huggingface_hub import hf_hub_download

    path = Path(name).expanduser()
    if path.is_file():
        return path
    owner, _, rest = name.partition("/")
    repository, _, file = rest.partition("/")
    reason = "there is no such file"
    if owner and file and not name.startswith((".", "~")):
        for local in (True, False):
            try:
                return Path(hf_hub_download(f"{owner}/{repository}", file, local_files_only=local))
            except (OSError, ValueError) as error:
                reason = next(iter(str(error).splitlines()), type(error).__name__)
    raise OSError(f"the weights {name} are not here ({reason}); {remedy}")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name of a ``.safetensors`` file, or of a ``.pt`` or ``.pth`` file that holds nothing but tensors.

    Raises:
        ValueError: the file is damaged, or holds other objects, which are not unpickled.
    """
    found: dict[str, object]
    try:
        found = dict(load_file(path)) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as weights ({next(iter(str(error).splitlines()), error)})") from error
    inner = found.get("state_dict", found)
    if not isinstance(inner, dict):
        raise ValueError(f"{path} holds no tensors by name")
    return {name.removeprefix("module."): value for name, value in inner.items() if isinstance(value, Tensor)}


def renamed(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors by other names: the first rule, a pattern and its replacement, that fits the whole name; others are left out."""
    found = {}
    for name, value in tensors.items():
        for pattern, replacement in rules:
            if match := re.fullmatch(pattern, name):
                found[match.expand(replacement)] = value
                break
    return found


def load_all(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Gives every parameter of ``model`` its tensor.

    Raises:
        ValueError: one has none, or of another shape.
    """
    wanted = dict(model.named_parameters())
    missing = sorted(name for name in wanted if name not in tensors or tensors[name].shape != wanted[name].shape)
    if missing:
        raise ValueError(
            f"{path} holds other weights: no tensor for {missing[0]} of shape {tuple(wanted[missing[0]].shape)}, "
            f"and {len(missing) - 1} more"
        )
    model.load_state_dict({name: tensors[name] for name in wanted}, strict=False)


def layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Number of layers ``<prefix>0.…``, ``<prefix>1.…``, …"""
    numbers = {name.removeprefix(prefix).partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len(numbers)
