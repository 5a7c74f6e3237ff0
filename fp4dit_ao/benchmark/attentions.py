"""Attention on quantized q, k and v beside PyTorch's attention on unquantized ones."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4dit_ao.benchmark import exact
from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.benchmark.worker import Workload
from fp4dit_ao.config import RECIPES, QuantConfig

CASES: tuple[dict[str, int], ...] = (
    {"batch": 2, "heads": 16, "queries": 1024, "keys": 1024, "dim": 72},  # PixArt-XL, 512 px: self-attention
    {"batch": 2, "heads": 16, "queries": 1024, "keys": 300, "dim": 72},  # … and to the text
    {"batch": 2, "heads": 24, "queries": 1178, "keys": 1178, "dim": 64},  # SD3, 512 px
    {"batch": 2, "heads": 16, "queries": 4096, "keys": 4096, "dim": 72},  # PixArt-XL, 1024 px
)
"""Guidance batch 2."""
_JUDGED_QUERIES = 64


class Attention(Workload):
    """One variant; the size changes from case to case.

    Args:
        method: a float type, or a recipe, which quantizes bfloat16 q, k and v as they come.
        mode: ``"eager"`` or ``"compiled"``.
        device: such as ``"cpu"``.
        threads: of the CPU.
    """

    def __init__(self, method: str, mode: str, device: str, threads: int):
        torch.set_num_threads(threads)
        self.device, self.dtype = device, getattr(torch, Variant(method).dtype)
        function = self._quantized(method) if method in RECIPES else F.scaled_dot_product_attention
        self._attend: Callable[..., Tensor] = torch.compile(function) if mode == "compiled" else function
        self._inputs: list[Tensor] = []

    @staticmethod
    def _quantized(recipe: str) -> Callable[..., Tensor]:
        from fp4dit_ao import kernels  # noqa: F401, registers the operator

        fmt = QuantConfig.from_name(recipe).attention
        return lambda q, k, v: torch.ops.fp4dit_ao.attention(q, k, v, None, None, fmt)

    @torch.no_grad()
    def prepare(self, **case: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        floats = [
            # as projections leave them: (batch, tokens, heads, dim)
            torch.randn(case["batch"], case[tokens], case["heads"], case["dim"], generator=generator).transpose(1, 2)
            for tokens in ("queries", "keys", "keys")
        ]
        self._inputs = [x.to(self.device, self.dtype) for x in floats]
        for _ in range(2):
            first = self._attend(*self._inputs)
        q, k, v = floats
        wanted = F.scaled_dot_product_attention(q[:, :, :_JUDGED_QUERIES], k, v)
        return {"error": exact.relative_error(first[:, :, :_JUDGED_QUERIES].cpu(), wanted)}

    @torch.no_grad()
    def run(self) -> None:
        self._attend(*self._inputs)
