"""Workload: attention with quantized q, k and v, compared with PyTorch's attention on the float tensors."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fp4dit_ao.kernels.attention  # noqa: F401, registers the operator
from fp4dit_ao.benchmark import exact
from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.benchmark.worker import Facts, Workload
from fp4dit_ao.config import RECIPES, QuantConfig

CASES = [
    {"heads": 16, "dim": 72, "queries": queries, "keys": keys}
    for queries, keys in ((1024, 1024), (4096, 4096), (1024, 300))
]
"""Default cases: PixArt-XL's self-attention at 512 and 1024 px, and its cross-attention at 512 px."""
_JUDGED_QUERIES = 64
"""Queries whose outputs are compared with float32."""


class Attention(Workload):
    """Attention by one variant: a float type (PyTorch's attention) or a recipe; batch 2, as with guidance."""

    def __init__(self, method: str, mode: str, device: str, threads: int):
        torch.set_num_threads(threads)
        self.method, self.mode, self.device = method, mode, device
        self.dtype: torch.dtype = getattr(torch, Variant(method).dtype)
        self.call: Callable[[], Tensor] = lambda: torch.empty(0)

    @torch.no_grad()
    def prepare(self, **case: Any) -> Facts:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(2, case[tokens], case["heads"], case["dim"], generator=generator).transpose(1, 2)
            for tokens in ("queries", "keys", "keys")
        )
        attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        if self.method in RECIPES:
            fmt = QuantConfig.from_name(self.method).attention
            attend = lambda q, k, v: torch.ops.fp4dit_ao.attention(q, k, v, None, None, fmt)  # noqa: E731
        if self.mode == "compiled":
            attend = torch.compile(attend, dynamic=True)
        self.call = functools.partial(attend, *(x.to(self.device, self.dtype) for x in (q, k, v)))
        first = self.call()
        self.call()
        wanted = F.scaled_dot_product_attention(q[:, :, :_JUDGED_QUERIES], k, v)
        return {"error": exact.relative_error(first[:, :, :_JUDGED_QUERIES].cpu(), wanted)}

    @torch.no_grad()
    def run(self) -> None:
        self.call()
