"""Part ``attention``: PyTorch's backends in bfloat16, and attention on quantized q, k and v, as ratios to the best backend."""

import contextlib
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.measuring import Call, Run, all_measured, quickest, ratios
from fp4dit_ao.kernels import fp8_attention
from fp4dit_ao.util.markdown import markdown_table

CASES = {
    "PixArt-XL, 1024 px": (2, 16, 4096, 4096, 72),
    "FLUX.1, 1024 px": (1, 24, 4608, 4608, 128),
    "PixArt-XL, text": (2, 16, 4096, 300, 72),
    "PixArt-XL, 512 px": (2, 16, 1024, 1024, 72),
}
"""Batch, heads, queries, keys and features of a head."""
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DEFAULT = "PyTorch's choice"
REPEAT = 10


def on(backend: SDPBackend | None, attend: Callable[[], Tensor]) -> Call:
    """``attend`` on one of PyTorch's backends; None leaves the choice to PyTorch."""

    def call() -> Tensor:
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
            return attend()

    return call


def calls(batch: int, heads: int, queries: int, keys: int, dim: int, device: str) -> dict[str, Call]:
    """Calls to time, by name."""
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(batch, tokens, heads, dim, device=device, dtype=torch.bfloat16).transpose(1, 2)
        for tokens in (queries, keys, keys)
    )

    def plain() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    compiled = torch.compile(lambda q, k, v: torch.ops.fp4dit_ao.attention(q, k, v, None, None, "e2m3"))
    return {
        DEFAULT: on(None, plain),
        **{name: on(backend, plain) for name, backend in BACKENDS.items()},
        "ours, E2M3 q, k and v": lambda: compiled(q, k, v),
    }


def measure(run: Run) -> None:
    """A row per shape."""
    rows = []
    for name, case in CASES.items():
        if not run.has_time(name, 20):
            continue
        result, _ = all_measured(calls(*case, run.device), run, REPEAT)
        run.record("attention", {"case": name, "sizes": case, **result})
        rows.append(row(name, result["seconds"]))
        run.say(" | ".join(rows[-1]))
        for shape, faster in fp8_attention.found().items():
            run.say(f"  FP8 scores {'are' if faster else 'are not'} taken for {shape.query} and {shape.keys} keys")
        for failed, why in result["failed"].items():
            run.say(f"  {failed}: {why}")
    run.say("\n" + markdown_table(HEAD, rows) + f"\n\nSpeed as a ratio to {DEFAULT}, bfloat16.")


HEAD = ["", *BACKENDS, "ours, E2M3 q, k and v", "the best backend", "its µs"]


def row(name: str, seconds: dict[str, list[float]]) -> list[str]:
    """Cells of a table's row."""
    speed = ratios(seconds, DEFAULT)
    best = quickest(seconds, lambda way: not way.startswith("ours"))
    took = f"{statistics.median(seconds[best]) * 1e6:.0f}" if best else ""
    return [name, *(f"{speed[way]:.2f}" if way in speed else "failed" for way in HEAD[1:-2]), best or "", took]
