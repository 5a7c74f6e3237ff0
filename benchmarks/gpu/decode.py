"""Part ``decode``: codebook groups to bytes: exactness on this GPU, bytes a second, and its share of a bfloat16 product."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.linears import SHAPES
from benchmarks.gpu.measuring import Run, all_measured
from fp4dit_ao.benchmark.linears import low_bit
from fp4dit_ao.kernels import codebook_linear, decoded_linear
from fp4dit_ao.util.markdown import markdown_table

TOKENS = 4096
"""Tokens of the bfloat16 product that decoding is compared with."""
REPEAT = 10
TYPES = {"E4M3": torch.float8_e4m3fn, "int8": torch.int8}
BASE = f"bfloat16, {TOKENS} tokens"


def measure(run: Run) -> None:
    """A row per shape."""
    rows = []
    for shape in (shape for shapes in SHAPES.values() for shape in shapes):
        if not run.has_time(f"{shape[0]} x {shape[1]}", 2):
            continue
        result = one(*shape, run)
        run.record("decode", result)
        rows.append(row(result))
        run.say(" | ".join(rows[-1]))
        for name, why in result["failed"].items():
            run.say(f"  {name}: {why}")
    run.say("\n" + markdown_table(HEAD, rows))


def one(features: int, depth: int, run: Run) -> dict[str, Any]:
    """Seconds of decoding to each type and of the product, and whether bytes are those of PyTorch's operators."""
    torch.manual_seed(0)
    weight = torch.randn(features, depth, device=run.device, dtype=torch.bfloat16)
    x = torch.randn(TOKENS if run.device == "cuda" else 16, depth, device=run.device, dtype=torch.bfloat16)
    held = low_bit(weight, "w4a6_codebook")
    stored = held.qdata, held.index, held.codebooks, held.group_size
    calls: dict[str, Callable[[], Any]] = {BASE: lambda: F.linear(x, weight)}
    for name, dtype in TYPES.items():
        calls[name] = lambda dtype=dtype: decoded_linear.decoded(*stored, dtype)  # type: ignore[misc]
    result, values = all_measured(calls, run, REPEAT)
    expected = codebook_linear.decode(*stored)
    exact = {name: torch.equal(values[name].float(), expected.float()) for name in TYPES if name in values}
    return {"out_features": features, "in_features": depth, "exact": exact, **result}


HEAD = ["weight", "exact", *(f"{name}, µs" for name in TYPES), "10¹² bytes / s", f"share of {BASE}"]


def row(result: dict[str, Any]) -> list[str]:
    """Cells of a table's row; bytes are what is read and written, and the better type's."""
    median = {name: statistics.median(taken) for name, taken in result["seconds"].items()}
    features, depth = result["out_features"], result["in_features"]
    quick = min((median[name] for name in TYPES if name in median), default=float("nan"))
    exact = all(result["exact"].values()) and len(result["exact"]) == len(TYPES)
    times = [f"{median[name] * 1e6:.1f}" if name in median else "failed" for name in TYPES]
    moved = features * depth * 1.5 / quick / 1e12
    share = f"{quick / median[BASE]:.1%}" if BASE in median else ""
    return [f"{features} x {depth}", "yes" if exact else "no", *times, f"{moved:.2f}", share]
