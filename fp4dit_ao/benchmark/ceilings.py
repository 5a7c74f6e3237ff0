"""Ceilings of the machine (products and bytes per second), and the least time of a linear that follows from them."""

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.benchmark.worker import Facts, Workload, timed

_PRODUCTS = [(512, 1152, 4608), (1024, 1152, 4608), (1024, 4608, 1152), (2048, 2048, 2048), (1024, 4096, 4096)]
"""Sizes of the matrix products that are tried, (rows, in_features, out_features), smallest first; the fastest counts."""
_SLOW = 0.5
"""Seconds of a product after which no larger one is tried: int8 on processors without a unit for it is slow at any size."""
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
        products = {name: self._products(*way) for name, way in _WAYS.items()}
        if has_onednn_int8(self.device):
            with contextlib.suppress(RuntimeError):  # not every build of it has int8
                products[ONEDNN] = self._products(torch.int8, _onednn)
        copies = {str(megabytes): self._copy(int(megabytes * 1e6)) for megabytes in _COPIES_MB}
        return {"products": products, "bytes": copies}

    def _products(self, dtype: torch.dtype, prepared: Callable[[Tensor, Tensor], Callable[[], object]]) -> float:
        """Multiply-adds per second."""
        best = 0.0
        for rows, depth, features in _PRODUCTS:
            x = torch.ones(rows, depth, dtype=dtype, device=self.device)
            weight = torch.ones(features, depth, dtype=dtype, device=self.device)
            seconds = self._seconds(prepared(x, weight))
            best = max(best, rows * depth * features / seconds)
            if seconds > _SLOW:
                break
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


ONEDNN = "int8, oneDNN"
"""oneDNN's int8 product with the weight laid out beforehand, one scale for all tokens and bfloat16 results."""


def has_onednn_int8(device: str) -> bool:
    """Whether oneDNN has an int8 product on ``device`` that is worth timing; with AVX2 alone it is a slow reference."""
    quick = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() != "AVX2"
    return torch.device(device).type == "cpu" and quick


def _onednn(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return _compat.prepacked_int8_linear(x, weight, torch.ones(len(weight)), torch.bfloat16)


def _product(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return functools.partial(torch.mm, x, weight.T)


_WAYS: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Callable[[], object]]]] = {
    "int8": (torch.int8, lambda x, weight: functools.partial(_compat.int8_product, x, weight.T)),
    "bfloat16": (torch.bfloat16, _product),
    "float32": (torch.float32, _product),
}
"""Types of the products, and what makes a call from tokens and weight."""


@dataclass(frozen=True)
class Roofline:
    """Least time that a linear could take, and what limits it.

    Attributes:
        compute: seconds of its products at the best int8 rate, ``torch._int_mm``'s or oneDNN's.
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
        rate = max(rate for name, rate in ceilings["products"].items() if name.startswith("int8"))
        return Roofline(rows * depth * features / rate, moved / bandwidth(ceilings, moved), call)


def bandwidth(ceilings: Rates, size: float) -> float:
    """Bytes per second of the smallest measured working set of at least ``size`` bytes, or of the largest."""
    measured = sorted((float(megabytes) * 1e6, rate) for megabytes, rate in ceilings["bytes"].items())
    fitting = [rate for limit, rate in measured if limit >= size]
    return fitting[0] if fitting else measured[-1][1]
