"""Linears with codebook groups against bfloat16 on a CPU: ``python -m benchmarks.codebook_linears``.

Ours quantizes tokens from bfloat16, multiplies and writes bfloat16, all within the time: by two operators, or by one that
quantizes tokens as it lays them out. Beside it, in turns: PyTorch's linear in bfloat16 (eager, and with prepacked weights where
the processor has instructions for it), in float32, which is quicker where it has not, and oneDNN's int8 product of tokens that
are quantized already, with one scale for all of them: what the processor can do, not the same computation. Ratios are medians
over the rounds of neighbours in time.

``--kernels`` compares the instruction sets of this processor with each other, on tokens that are quantized already.
``--joined`` measures something else: linears that read the same tokens as one product against one product each, alone and in
compiled transformers of the reference pipeline's and of PixArt-XL's sizes.
"""

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fp4dit_ao import _compat
from fp4dit_ao.benchmark.ceilings import has_onednn_int8
from fp4dit_ao.benchmark.transformers import PIXART_XL, quantized, random_model, sample
from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.evaluation.environment import one_line
from fp4dit_ao.evaluation.fidelity import markdown_table
from fp4dit_ao.kernels import codebook_linear
from fp4dit_ao.kernels.cpu import native

SHAPES = ((1152, 1152), (4608, 1152), (1152, 4608))
"""Output and input features of PixArt-XL's linears."""
GROUP = 128
JOINED, SEPARATE = "joined", "separate"
TOGETHER = (
    (3, 256, 128), (2, 256, 32), (3, 1152, 512), (3, 1152, 2048), (3, 1152, 8192), (2, 1152, 600),
)  # fmt: skip
"""Linears that read one value, their width, and its tokens: q, k and v of the reference pipeline's images and k and v of its
texts, and of PixArt-XL's images at 256, 512 and 1024 px and of its texts; guidance doubles them."""
RECIPE = "w4a6_codebook"
OURS, AT_ONCE, EAGER, PREPACKED, ONEDNN, FLOAT32 = "ours", "at once", "eager", "prepacked", "oneDNN", "float32"
FLOATS = (EAGER, PREPACKED, FLOAT32)


def main(
    counts: Annotated[
        str, typer.Option("--tokens", help="Rows, separated by commas.")
    ] = "1,4,16,64,256,512,1024,2048,4096",
    fmt: Annotated[str, typer.Option("--format", help="Of the tokens.")] = "e2m3",
    rounds: Annotated[int, typer.Option(min=1, help="At least; small shapes take more.")] = 15,
    threads: Annotated[int, typer.Option(min=0, help="0 takes PyTorch's number.")] = 0,
    joined: Annotated[
        bool, typer.Option(help="One product for linears that share their tokens against one each.")
    ] = False,
    kernels: Annotated[bool, typer.Option(help="Instruction sets of this processor against the best of them.")] = False,
    layers: Annotated[int, typer.Option(help="Of the transformer as wide as PixArt-XL; 0 leaves it out.")] = 2,
) -> None:
    """Print the table."""
    if threads:
        torch.set_num_threads(threads)
    if not native.is_built():  # it has said why, and what to do
        raise typer.Exit(1)
    if joined:
        _print_joined(fmt, rounds, layers)
        return
    cases = [(*shape, int(count)) for shape in SHAPES for count in counts.split(",")]
    if kernels:
        _print_kernels(cases, fmt, rounds)
        return
    rows, gains = [], []
    for features, depth, count in track(cases, "measuring", console=Console(stderr=True)):
        seconds = _turns(_ways(features, depth, count, fmt), rounds, enough=0.5)
        gain, at_once = (_ratio(seconds, lambda t: min(t[way] for way in FLOATS), ours) for ours in (OURS, AT_ONCE))
        gains.append(gain)
        against = f"{_ratio(seconds, lambda t: t[ONEDNN]):.2f}" if ONEDNN in seconds[0] else "–"
        medians = [f"{statistics.median(t[way] for t in seconds) * 1e3:.3f}" for way in (OURS, *FLOATS)]
        rows.append([f"{features} x {depth}", str(count), *medians, f"{gain:.2f}", f"{at_once:.2f}", against])
    head = [
        "out x in",
        "tokens",
        "ours, ms",
        "eager, ms",
        "prepacked, ms",
        "float32, ms",
        "best float / ours",
        "at once",
        "oneDNN int8 / ours",
    ]
    print(markdown_table(head, rows))
    kernel = next(iter(codebook_linear.kernels()))
    print(f"\nBest float / ours: {min(gains):.2f} to {max(gains):.2f}, median {statistics.median(gains):.2f}.")
    print(f"{fmt.upper()} tokens, groups of {GROUP}; kernel {kernel}; {one_line()}")


def _print_kernels(cases: list[tuple[int, int, int]], fmt: str, rounds: int) -> None:
    """Print how many times as long as the best instruction set the others take."""
    rows = []
    for features, depth, count in track(cases, "measuring", console=Console(stderr=True)):
        weight = _weight(features, depth)
        x = torch.randn(count, depth, generator=torch.Generator().manual_seed(1)).bfloat16()
        levels, scale = torch.ops.fp4dit_ao.quantize_tokens(x, fmt)
        how = levels, scale, *weight, None, torch.bfloat16, levels.shape[0] // count
        ways: dict[str, Callable[[], object]] = {}
        for kernel in codebook_linear.kernels():
            with contextlib.suppress(RuntimeError):  # a kernel that cannot take such levels
                codebook_linear.run(*how, kernel=kernel)
                ways[kernel] = functools.partial(codebook_linear.run, *how, kernel=kernel)
        best, *others = ways
        seconds = _turns(ways, rounds, enough=0.5)
        shown = f"{best}, {statistics.median(t[best] for t in seconds) * 1e3:.3f} ms"
        said = [f"{other} {_ratio(seconds, lambda t, other=other: t[other], best):.2f}" for other in others]
        rows.append([f"{features} x {depth}", str(count), shown, ", ".join(said)])
    print(markdown_table(["out x in", "tokens", "best", "others / best"], rows))
    print(f"\n{fmt.upper()} tokens, groups of {GROUP}; {one_line()}")


def _weight(features: int, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random codes, indices, codebooks and row scales."""
    g = torch.Generator().manual_seed(0)
    qdata = torch.randint(0, 256, (features, depth // 2), dtype=torch.uint8, generator=g)
    index = torch.randint(0, 256, (features, (depth // GROUP + 1) // 2), dtype=torch.uint8, generator=g)
    codebooks = torch.randint(-120, 121, (16, 16), dtype=torch.int8, generator=g)
    return qdata, index, codebooks, torch.rand(features, generator=g)


def _ways(features: int, depth: int, count: int, fmt: str) -> dict[str, Callable[[], object]]:
    """Functions to time, by name. Without oneDNN or AVX-512, bfloat16 is eager and there is no int8 product."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, depth, generator=g).bfloat16()
    weight, bias = torch.randn(features, depth, generator=g).bfloat16(), torch.randn(features, generator=g)
    qdata, index, codebooks, row_scale = _weight(features, depth)
    half_bias = bias.bfloat16()

    def ours() -> Tensor:
        levels, scale = torch.ops.fp4dit_ao.quantize_tokens(x, fmt)
        return torch.ops.fp4dit_ao.codebook_linear(
            levels, scale, qdata, index, codebooks, row_scale, bias, torch.bfloat16, digits
        )

    def at_once() -> Tensor:
        return torch.ops.fp4dit_ao.quantized_codebook_linear(
            x, fmt, qdata, index, codebooks, row_scale, bias, torch.bfloat16
        )

    levels, scale = torch.ops.fp4dit_ao.quantize_tokens(x, fmt)
    digits = levels.shape[0] // count
    reference = codebook_linear.reference_codebook_linear(
        levels, scale, qdata, index, codebooks, row_scale, bias, torch.bfloat16, digits
    )
    assert torch.equal(ours(), reference)
    assert torch.equal(at_once(), reference)

    def eager() -> Tensor:
        return F.linear(x, weight, half_bias)

    floats = x.float(), weight.float(), bias

    def float32() -> Tensor:
        return F.linear(*floats)

    ways: dict[str, Callable[[], object]] = {
        OURS: ours, EAGER: eager, AT_ONCE: at_once, PREPACKED: eager, FLOAT32: float32
    }  # fmt: skip
    if not torch.backends.mkldnn.is_available():
        return ways
    with contextlib.suppress(RuntimeError):  # a processor without instructions for bfloat16
        ways[PREPACKED] = _compat.prepacked_linear(x, weight, half_bias)
    if not has_onednn_int8("cpu"):
        return ways
    integers = codebook_linear.decode(qdata, index, codebooks, GROUP)
    ways[ONEDNN] = _compat.prepacked_int8_linear(levels[:count], integers, torch.ones(features), torch.bfloat16)
    return ways


def _print_joined(fmt: str, rounds: int, layers: int) -> None:
    """Print what joining gains."""
    rows = []
    for linears, width, count in track(TOGETHER, "measuring", console=Console(stderr=True)):
        seconds = _turns(_together(linears, width, count, fmt), rounds, enough=1.0)
        rows.append([f"{linears} x {width} x {width}, {count} tokens", *_joined_cells(seconds)])
    models: dict[str, tuple[torch.nn.Module, dict[str, Any]]] = {"reference pipeline, 64 px": _reference()}
    if layers:
        config = PIXART_XL | {"num_layers": layers}
        models[f"PixArt-XL, {layers} layers, 512 px"] = (
            random_model(config, 512, torch.bfloat16), dict(sample(512, torch.bfloat16, config)),
        )  # fmt: skip
    for name, (model, given) in models.items():
        seconds = _turns(_steps(model, given), rounds, enough=5.0)
        rows.append([f"a compiled step: {name}", *_joined_cells(seconds)])
    print(markdown_table(["", "separate, ms", "joined, ms", "separate / joined"], rows))
    print(
        f"\n{fmt.upper()} tokens alone, {RECIPE} in steps; kernel {next(iter(codebook_linear.kernels()))}; {one_line()}"
    )


def _joined_cells(seconds: list[dict[str, float]]) -> list[str]:
    medians = [f"{statistics.median(t[way] for t in seconds) * 1e3:.3f}" for way in (SEPARATE, JOINED)]
    return [*medians, f"{_ratio(seconds, lambda t: t[SEPARATE], JOINED):.3f}"]


def _together(linears: int, width: int, count: int, fmt: str) -> dict[str, Callable[[], object]]:
    """One product of all rows, sliced, and one product each; tokens are quantized once in both."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(count, width, generator=g).bfloat16()
    qdata, index, codebooks, row_scale = _weight(linears * width, width)
    bias = torch.randn(linears * width, generator=g)
    parts = [slice(start, start + width) for start in range(0, linears * width, width)]

    def products(*every: slice) -> list[Tensor]:
        levels, scale = torch.ops.fp4dit_ao.quantize_tokens(x, fmt)
        how = torch.bfloat16, levels.shape[0] // count
        return [
            torch.ops.fp4dit_ao.codebook_linear(
                levels, scale, qdata[rows], index[rows], codebooks, row_scale[rows], bias[rows], *how
            )
            for rows in every
        ]

    def as_one() -> list[Tensor]:
        (y,) = products(slice(None))
        return [y[:, part] for part in parts]

    def apart() -> list[Tensor]:
        return products(*parts)

    assert all(map(torch.equal, as_one(), apart()))
    return {JOINED: as_one, SEPARATE: apart}


def _reference() -> tuple[torch.nn.Module, dict[str, Any]]:
    """A transformer of the reference pipeline's sizes, and a call with guidance, batch 2."""
    from fp4dit_ao.reference.architecture import TEXT_LENGTH, build_transformer

    model = build_transformer().to(torch.bfloat16).eval().requires_grad_(False)
    given = sample(128, torch.bfloat16, {"in_channels": 4, "caption_channels": 256})
    text = torch.randn(2, TEXT_LENGTH, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    return model, dict(given) | {"encoder_hidden_states": text}


@torch.no_grad()
def _steps(model: torch.nn.Module, given: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """A quantized and compiled model, with linears joined and without; their outputs are equal."""
    found: QuantizedTransformer = quantized(model, given, RECIPE)
    forms = {JOINED: found.compile_graph(), SEPARATE: copy.deepcopy(found).compile_graph(joined=False)}
    outputs = [form(**given)[0] for form in forms.values()]
    print(f"outputs of both steps are {'equal' if torch.equal(*outputs) else 'not equal'} in every bit")
    return {name: torch.no_grad()(functools.partial(form, **given)) for name, form in forms.items()}


def _turns(ways: dict[str, Callable[[], object]], rounds: int, enough: float) -> list[dict[str, float]]:
    """Seconds of each way in every round; until there are `rounds` and they took `enough`. The first two rounds warm up."""
    turns: list[dict[str, float]] = []
    while len(turns) < rounds + 2 or sum(sum(turn.values()) for turn in turns) < enough:
        turn = {}
        for way, call in ways.items():
            start = time.perf_counter()
            call()
            turn[way] = time.perf_counter() - start
        turns.append(turn)
    return turns[2:]


def _ratio(turns: list[dict[str, float]], other: Callable[[dict[str, float]], float], ours: str = OURS) -> float:
    """Median over the rounds of how many times as long as ours another way took."""
    return statistics.median(other(turn) / turn[ours] for turn in turns)


if __name__ == "__main__":
    typer.run(main)
