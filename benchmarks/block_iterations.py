"""Seconds and memory of learned rounding for one block of FLUX.1 and of Wan 14B: ``python -m benchmarks.block_iterations``.

The figures from which docs/scaling.md computes what a whole model costs on many devices. Weights are random, in bfloat16;
an iteration is the difference of a long and a short run, so that what comes before and after the iterations drops out.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import AdaRoundConfig, capture, quantizer_for, reconstruct
from fp4dit_ao.benchmark import memory
from fp4dit_ao.evaluation.environment import one_line
from fp4dit_ao.observers.weight import weight_of
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.util.atomic_files import write_text
from fp4dit_ao.util.markdown import markdown_table

Case = tuple[nn.Module, Callable[[int], dict[str, Any]]]
"""A model with one block of each kind, and its sample of a number."""


def flux(tiny: bool) -> Case:
    """FLUX.1 at 1024 pixels: 4096 image tokens, 512 of the text."""
    from diffusers import FluxTransformer2DModel

    heads, tokens, text, width = (2, 16, 8, 64) if tiny else (24, 4096, 512, 4096)
    axes = (16, 24, 24) if tiny else (16, 56, 56)
    model = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=heads, attention_head_dim=sum(axes), axes_dims_rope=axes,
        joint_attention_dim=width, pooled_projection_dim=64, in_channels=64,
    )  # fmt: skip
    side = round(tokens**0.5)
    places = torch.cartesian_prod(torch.zeros(1), *[torch.arange(side, dtype=torch.float32)] * 2)

    def sample(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": normal(seed, 1, tokens, 64), "encoder_hidden_states": normal(seed, 1, text, width),
            "pooled_projections": normal(seed, 1, 64), "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
            "img_ids": places, "txt_ids": torch.zeros(text, 3),
        }  # fmt: skip

    return model, sample


def wan(tiny: bool) -> Case:
    """Wan 14B at 480p: 81 frames of 832 x 480 are 32,760 tokens; 512 of the text."""
    from diffusers import WanTransformer3DModel

    heads, head, inner, latents = (2, 64, 256, (2, 8, 8)) if tiny else (40, 128, 13824, (21, 60, 104))
    text = 64 if tiny else 4096
    model = WanTransformer3DModel(
        num_layers=1, num_attention_heads=heads, attention_head_dim=head, ffn_dim=inner, text_dim=text, freq_dim=256,
        in_channels=16, out_channels=16, patch_size=(1, 2, 2),
    )  # fmt: skip

    def sample(seed: int) -> dict[str, Any]:
        return {
            "hidden_states": normal(seed, 1, 16, *latents), "encoder_hidden_states": normal(seed, 1, 512, text),
            "timestep": torch.tensor([500]),
        }  # fmt: skip

    return model, sample


MODELS = {"flux": flux, "wan": wan}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def measure(name: str, rows: int, iters: Sequence[int], tiny: bool, compile: bool) -> list[list[str]]:
    """A line of the table for each block."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, sample = MODELS[name](tiny)
    model.to(device, torch.bfloat16).eval().requires_grad_(False)
    samples = [{k: x.to(device) for k, x in sample(seed).items()} for seed in range(rows)]
    with torch.no_grad():
        prepared = prepare_pt2e(capture(model, samples[0]), quantizer_for(model, "w4a6_codebook"))
    weights = {o.name: weight_of(prepared, node).numel() for node, o in weight_observers(prepared)}
    found: dict[str, list[float]] = {}
    resident = memory.reset_peak()
    for count in (1, *iters):  # the first warms up
        config = AdaRoundConfig(iters=count, batch_size=rows, compile=compile)
        for row in reconstruct(prepared, samples, config, progress=False).rows:
            found.setdefault(row.block, []).append(row.seconds)
    peak = (memory.peak() - resident) / 2**30
    lines = []
    for block, (_, short, long) in found.items():
        sizes = [size for weight, size in weights.items() if weight.startswith(f"{block}.")]
        seconds = (long - short) / (iters[1] - iters[0])
        lines.append([name, block, f"{sum(sizes) / 1e6:.3g}", str(rows), f"{seconds:.3f}", f"{peak:.1f}"])
    return lines


def main(
    models: Annotated[str, typer.Option(help="flux, wan, or both, with a comma.")] = "flux,wan",
    rows: Annotated[str, typer.Option(help="Rows of an iteration on this device, with commas.")] = "1,2",
    iters: Annotated[str, typer.Option(help="A short and a long run.")] = "3,11",
    compile: bool = False,
    tiny: Annotated[bool, typer.Option(help="Small models, to try the command.")] = False,
    out: Path | None = None,
) -> None:
    """Measures and prints."""
    short, long = map(int, iters.split(","))
    head = ["model", "block", "million weights", "rows", "s / block-iteration", "peak memory of the model, GiB"]
    lines: list[list[str]] = []
    for name in models.split(","):
        for count in map(int, rows.split(",")):
            began = time.monotonic()
            lines += measure(name, count, (short, long), tiny, compile)
            print(f"{name}, {count} rows: {time.monotonic() - began:.0f} s in all", flush=True)
    text = f"{markdown_table(head, lines)}\n\n{one_line()}\n"
    print(f"\n{text}")
    if out is not None:
        write_text(out, text)


if __name__ == "__main__":
    typer.run(main)
