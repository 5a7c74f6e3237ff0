"""Token quantization after a preceding operation, on a CPU: ``python -m benchmarks.tokens``.

Compares one kernel that Inductor fuses from both with Inductor's kernel of the operation followed by our compiled loop,
in turns; printed are medians over the rounds, and the time of the operation alone. Equality of the levels is checked.
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from fp4dit_ao.evaluation.environment import one_line
from fp4dit_ao.kernels import token_quantization
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.util.markdown import markdown_table


def modulated(x: Tensor) -> Tensor:
    """LayerNorm, then scale and shift of the features."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + x[:1]) + x[1:2]


BEFORE: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "nothing": (1152, lambda x: x),
    "LayerNorm and modulation": (1152, modulated),
    "GELU": (4608, torch.ops.fp4dit_ao.tanh_gelu),
    "a view as 16 heads": (1152, lambda x: x.unflatten(-1, (16, -1)).transpose(0, 1)),
}
"""Preceding operations by name: features at PixArt-XL's width, and the function."""


def main(
    count: Annotated[int, typer.Option("--tokens", help="Rows.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1)] = 15,
    fmt: Annotated[str, typer.Option("--format", help="Of the tokens.")] = "e2m3",
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Prints the table."""
    torch.set_num_threads(threads)
    if not native.is_built():  # shared_object() has warned why, and what to do
        raise typer.Exit(1)
    rows = []
    for name, (features, before) in BEFORE.items():
        x = torch.randn(count, features, generator=torch.Generator().manual_seed(0)).bfloat16()
        ways = {
            "alone": torch.compile(before, dynamic=True),
            "fused": torch.compile(
                lambda x, before=before: token_quantization.operator_tokens(before(x), fmt), dynamic=True
            ),
            "loop": torch.compile(
                lambda x, before=before: torch.ops.fp4dit_ao.int8_tokens(before(x), fmt), dynamic=True
            ),
        }
        assert all(torch.equal(a, b) for a, b in zip(ways["fused"](x), ways["loop"](x), strict=True)), name
        seconds = _medians(ways, x, rounds)
        cells = [f"{seconds[way] * 1e3:.2f}" for way in ways]
        rows.append([name, str(features), *cells, f"{seconds['fused'] / seconds['loop']:.2f}"])
    print(markdown_table(["before", "features", "alone, ms", "fused, ms", "with the loop, ms", "fused / loop"], rows))
    print(f"\n{count} tokens in bfloat16 to {fmt.upper()}; {one_line()}")


def _medians(ways: dict[str, Callable[[Tensor], object]], x: Tensor, rounds: int) -> dict[str, float]:
    """Median seconds of each way, called in turns; the first round warms up."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, call in ways.items():
            start = time.perf_counter()
            call(x)
            taken[way].append(time.perf_counter() - start)
    return {way: statistics.median(times[1:]) for way, times in taken.items()}


if __name__ == "__main__":
    typer.run(main)
