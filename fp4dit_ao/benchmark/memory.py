"""Bytes of a model's tensors, and peak memory of its process."""

import gc
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


def reset_peak() -> int:
    """Resets the peak; returns the bytes in use now: resident in the process, or allocated on the GPU if there is
    one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():  # without it the peak is that of the whole process
        clear.write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes in use since :func:`reset_peak`."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines[field].split()[0]) * 1024
    import resource  # Unix alone has it

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def stored(state: Mapping[str, object]) -> dict[str, int]:
    """Bytes of every entry of a ``state_dict``, by name; those of all parts for low-bit tensors."""
    return {name: sum(part.nbytes for part in _parts(x)) for name, x in state.items() if isinstance(x, Tensor)}


def _parts(x: Tensor) -> Iterator[Tensor]:
    if hasattr(x, "__tensor_flatten__"):
        for name in x.__tensor_flatten__()[0]:
            yield from _parts(getattr(x, name))
    else:
        yield x.detach()


def weight_bytes(model: nn.Module) -> int:
    """Bytes of everything in the ``state_dict`` of ``model``."""
    return sum(stored(model.state_dict()).values())


def bits_per_weight(model: nn.Module, shapes: Mapping[str, Iterable[int]]) -> float:
    """Bits per weight of linears: all that is stored for them, without biases.

    Args:
        model: holds the linears.
        shapes: shapes of the float weights, by name of the linear.
    """
    taken = 0
    for entry, size in stored(model.state_dict()).items():
        parts = entry.split(".")
        inside = any(".".join(parts[:count]) in shapes for count in range(1, len(parts)))
        taken += size if inside and parts[-1] != "bias" else 0
    return 8 * taken / sum(math.prod(shape) for shape in shapes.values())
