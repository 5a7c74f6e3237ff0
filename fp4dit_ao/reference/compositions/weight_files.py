"""Averaged weights as a few files of bfloat16, each small enough to be carried anywhere."""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fp4dit_ao.util.atomic_files import whole_file

LARGEST = 15_000_000
"""Most bytes in a file."""


def write_weights(tensors: dict[str, Tensor], folder: Path, step: int) -> None:
    """Writes ``weights-0.safetensors`` and so on, each whole or not at all."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu", torch.bfloat16).contiguous()
        if parts[-1] and size + tensor.nbytes > LARGEST:
            parts.append({})
            size = 0
        parts[-1][name] = tensor
        size += tensor.nbytes
    for index, part in enumerate(parts):
        with whole_file(folder / f"weights-{index}.safetensors") as path:
            save_file(part, path, {"step": str(step)})


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Reads what :func:`write_weights` wrote.

    Raises:
        FileNotFoundError: there is no such file.
    """
    files = sorted(folder.glob("weights-*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there is no weights-0.safetensors in {folder}; train first")
    found: dict[str, Tensor] = {}
    steps = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            steps.add(opened.metadata()["step"])
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
    if len(steps) > 1:
        print(f"the files in {folder} are averages of different steps ({', '.join(sorted(steps))}): a save was cut off")
    return found
