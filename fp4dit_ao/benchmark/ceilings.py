"""Ceilings of the machine (products and bytes per second), and the least time of a linear that follows from them."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fp4dit_ao import _compat
from fp4dit_ao.benchmark.worker import Facts, Workload, timed

_PRODUCTS = [(512, 1152, 4608), (1024, 1152, 4608), (1024, 4608, 1152), (1024, 4096, 4096), (2048, 2048, 2048)]
"""Sizes of the matrix products that are tried, (rows, in_features, out_features); the fastest counts."""
_COPIES_MB = (0.5, 2, 8, 32, 128, 512)
"""Working sets of the copies, in MB."""

Rates = Mapping[str, Mapping[str, float]]
"""What :class:`Ceilings` finds: products a second by type, and bytes a second by working set in MB."""


class Ceilings(Workload):
    """Workload that measures all ceilings in ``prepare``."""

    def __init__(self, device: str, threads: int, repeats: int):
        torch.set_num_threads(threads)
        self.device, self.repeats = device, repeats

    def prepare(self, **case: object) -> Facts:
        products = {name: self._products(dtype) for name, dtype in _TYPES.items()}
        copies = {str(megabytes): self._copy(int(megabytes * 1e6)) for megabytes in _COPIES_MB}
        return {"products": products, "bytes": copies}

    def _products(self, dtype: torch.dtype) -> float:
        """Multiply-adds per second."""
        best = 0.0
        for rows, depth, features in _PRODUCTS:
            a = torch.ones(rows, depth, dtype=dtype, device=self.device)
            b = torch.ones(features, depth, dtype=dtype, device=self.device).T
            multiply = _compat.int8_product if dtype == torch.int8 else torch.mm
            best = max(best, rows * depth * features / self._seconds(functools.partial(multiply, a, b)))
        return best

    def _copy(self, size: int) -> float:
        """Bytes read and written per second, over a working set of ``size`` bytes."""
        source = torch.ones(size // 2, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = max(1, int(2e7 / size))

        def copy() -> None:
            for _ in range(times):
                target.copy_(source)

        return size * times / self._seconds(copy)

    def _seconds(self, call: Callable[[], object]) -> float:
        call()
        self.call = call
        return min(timed(self) for _ in range(self.repeats))

    def run(self) -> None:
        self.call()


_TYPES = {"int8": torch.int8, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Roofline:
    """Least time that a linear could take, and what limits it.

    Attributes:
        compute: seconds of its products at the best int8 rate.
        memory: seconds of its bytes (weights, tokens in and out) at the bandwidth of a working set of that size.
        call: seconds of a call that computes almost nothing.
    """

    compute: float
    memory: float
    call: float

    @property
    def seconds(self) -> float:
        """Least time in seconds."""
        return max(self.compute, self.memory) + self.call

    @property
    def bound(self) -> str:
        """The largest part: ``"products"``, ``"memory"`` or ``"the call"``."""
        return max(("products", self.compute), ("memory", self.memory), ("the call", self.call), key=lambda x: x[1])[0]

    @staticmethod
    def of(case: Mapping[str, int], weight_bytes: float, ceilings: Rates, call: float) -> "Roofline":
        """Least time of the case ``{"out_features": …, "in_features": …, "tokens": …}``, with bfloat16 tokens in and
        out."""
        rows, depth, features = case["tokens"], case["in_features"], case["out_features"]
        moved = weight_bytes + 2 * rows * (depth + features)
        return Roofline(
            rows * depth * features / ceilings["products"]["int8"], moved / bandwidth(ceilings, moved), call
        )


def bandwidth(ceilings: Rates, size: float) -> float:
    """Bytes per second of the smallest measured working set of at least ``size`` bytes, or of the largest."""
    measured = sorted((float(megabytes) * 1e6, rate) for megabytes, rate in ceilings["bytes"].items())
    fitting = [rate for limit, rate in measured if limit >= size]
    return fitting[0] if fitting else measured[-1][1]
