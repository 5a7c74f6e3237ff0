"""Places of a model that is loaded: its folder or repository, and the device that diffusers' ``device_map`` names."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import torch

from fp4dit_ao.util.sentences import first_line

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""Arguments of ``from_pretrained`` that say how a repository is downloaded."""
_FREE = ("auto", "balanced", "balanced_low_0", "sequential")
"""Maps that leave the device to accelerate."""


def resolve_folder(name: str | Path, subfolder: str | None = None, **hub: object) -> Path:
    """Path of the folder ``name``, or of the local copy of that Hugging Face repository, which is downloaded if
    necessary.

    Args:
        name: a folder, or ``owner/name`` of a repository.
        subfolder: the part that is needed, all of it if None; not part of the result.
        hub: arguments of ``from_pretrained``, such as ``revision`` and ``local_files_only``; others are left aside.

    Raises:
        FileNotFoundError: there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    parts = str(name).split("/")
    if len(parts) == 2 and all(parts) and not str(name).startswith((".", "~")):
        from huggingface_hub import snapshot_download

        download = cast("Callable[..., str]", snapshot_download)
        how = {key: value for key, value in hub.items() if key in _HUB and value is not None}
        try:
            return Path(download(str(name), **how, **({"allow_patterns": f"{subfolder}/*"} if subfolder else {})))
        except Exception as error:
            raise FileNotFoundError(
                f"there is no folder {name}, and no such model on the hub: {first_line(error)}"
            ) from error
    raise FileNotFoundError(f"there is no folder {name}")


def one_device(device_map: object) -> torch.device | None:
    """The device to which ``device_map`` sends a whole model; None if it is None.

    Args:
        device_map: as ``from_pretrained`` takes it: a device, ``"auto"``, or devices by parts of the model.

    Raises:
        ValueError: it spreads the model over several devices, or leaves a part on disk.
    """
    found = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map}
    if len(found) != 1 or "disk" in found:
        raise ValueError(
            f"device_map={device_map!r}: a quantized graph is on one device; give one, such as device_map='cuda', or load the "
            "model by its own class, which gives the module form"
        )
    (device,) = found
    if not isinstance(device, str | int | torch.device):
        return None
    if device in _FREE:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device(device)
