"""Which of PyTorch's attention backends is the fastest on a GPU, measured once for each shape while the process runs.

PyTorch takes the first that can, FlashAttention as a rule; which is the fastest differs from GPU to GPU and with the size of a
head. A compiled graph keeps the one that is the fastest for the sizes it is compiled with.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fp4dit_ao import _compat

DEVICES = ("cuda",)
"""Types of devices that have a choice."""
CANDIDATES = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
_ROUNDS, _CALLS = 5, 4
"""Timed rounds, the median of which counts, and calls in each."""


class AttentionShape(NamedTuple):
    """Sizes and types that decide which backend is the fastest.

    Attributes:
        device: of all tensors.
        dtype: of q, k and v.
        query: (batch, heads, queries, dim).
        keys: number of keys.
        mask: shape of the mask; None without one.
    """

    device: torch.device
    dtype: torch.dtype
    query: tuple[int, ...]
    keys: int
    mask: tuple[int, ...] | None


_FASTEST: dict[AttentionShape, SDPBackend | None] = {}
"""Results of :func:`fastest`."""


def preferred(q: Tensor, k: Tensor, mask: Tensor | None) -> contextlib.AbstractContextManager[object]:
    """A context in which ``scaled_dot_product_attention`` takes the fastest backend; on CPUs it does nothing."""
    shape = shape_of(q, k, mask)
    backend = None if shape is None else fastest(shape)
    if backend is None:
        return contextlib.nullcontext()
    others = [each for each in (*CANDIDATES, SDPBackend.MATH) if each is not backend]
    return sdpa_kernel([backend, *others], set_priority=True)


def shape_of(q: Tensor, k: Tensor, mask: Tensor | None) -> AttentionShape | None:
    """What decides which way is the fastest; None on CPUs, which have no choice, and where sizes are not known."""
    if q.device.type not in DEVICES or q.ndim != 4:
        return None
    sizes = [_compat.size_hint(size) for size in (*q.shape, k.shape[-2], *(() if mask is None else mask.shape))]
    if any(size is None for size in sizes):
        return None
    batch, heads, queries, dim, keys, *rest = (int(size) for size in sizes if size is not None)
    return AttentionShape(q.device, q.dtype, (batch, heads, queries, dim), keys, None if mask is None else tuple(rest))


def fastest(
    shape: AttentionShape, measure: Callable[[SDPBackend, AttentionShape], float] | None = None
) -> SDPBackend | None:
    """The candidate that ``measure`` (by default :func:`seconds`) finds quickest; None leaves the choice to PyTorch.

    A candidate that raises ``RuntimeError`` cannot take the shape. While a CUDA graph is captured nothing can be measured.
    """
    if shape not in _FASTEST:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        _FASTEST[shape] = _quickest(shape, CANDIDATES, measure or seconds)
    return _FASTEST[shape]


def _quickest(
    shape: AttentionShape,
    candidates: Sequence[SDPBackend],
    measure: Callable[[SDPBackend, AttentionShape], float],
) -> SDPBackend | None:
    took: dict[SDPBackend, float] = {}
    for backend in candidates:
        try:
            took[backend] = measure(backend, shape)
        except RuntimeError:
            continue
    return min(took, key=lambda backend: took[backend], default=None)


@torch.no_grad()
def seconds(backend: SDPBackend, shape: AttentionShape) -> float:
    """Seconds of one attention of that shape, on random tensors; also while a graph is traced.

    Raises:
        RuntimeError: the backend cannot take the shape.
    """
    with _compat.without_modes(), sdpa_kernel(backend):
        batch, heads, _, dim = shape.query
        q = torch.randn(shape.query, device=shape.device, dtype=shape.dtype)
        k, v = (torch.randn((batch, heads, shape.keys, dim), device=shape.device, dtype=shape.dtype) for _ in range(2))
        mask = None if shape.mask is None else torch.zeros(shape.mask, device=shape.device, dtype=shape.dtype)
        return median_seconds(lambda: F.scaled_dot_product_attention(q, k, v, mask), shape.device)


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median over rounds, of which the first, which warms up, does not count."""
    rounds = []
    for _ in range(_ROUNDS + 1):
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(_CALLS):
            call()
        _synchronize(device)
        rounds.append((time.perf_counter() - began) / _CALLS)
    return statistics.median(rounds[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
