"""SQNR of a model's linear weights in each 4-bit format: ``python -m benchmarks.weights FILE.safetensors``.

Prints the signal-to-quantization-noise ratio of nearest rounding over all two-dimensional weights whose inputs the
group size divides (without embeddings), by format and by scale search. The default file is the reference transformer's.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import safe_open
from tqdm import tqdm

from fp4dit_ao import reference
from fp4dit_ao.config import QuantConfig
from fp4dit_ao.formats import parse
from fp4dit_ao.observers.scale_search import SEARCHES, squared_error
from fp4dit_ao.util.markdown import markdown_table


def main(
    file: Annotated[Path | None, typer.Argument(help="safetensors of a float model.")] = None,
    group_size: int = 128,
    formats: Annotated[str, typer.Option(help="Comma-separated; those that w4a6_auto chooses from.")] = ",".join(
        QuantConfig.from_name("w4a6_auto").weight_candidates
    ),
    scale: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
) -> None:
    """Prints the table."""
    file = file or reference.path() / "transformer" / "diffusion_pytorch_model.safetensors"
    names = formats.split(",")
    noise = {(name, search): 0.0 for name in names for search in SEARCHES}
    signal, count = 0.0, 0
    with safe_open(file, "pt") as opened:
        weights = [name for name in opened.keys() if name.endswith(".weight") and "embed" not in name]  # noqa: SIM118
        for weight in tqdm(weights, desc="weights"):
            x = opened.get_tensor(weight).float()
            if x.ndim != 2 or x.shape[1] % group_size:
                continue
            signal, count = signal + float(x.double().square().sum()), count + x.numel()
            for name, search in noise:
                found = SEARCHES[search](x, [1, group_size], parse(name), getattr(torch, scale))
                noise[name, search] += float(squared_error(x, [1, group_size], parse(name), found).double().sum())
    rows = [[name, *(f"{10 * math.log10(signal / noise[name, search]):.1f}" for search in SEARCHES)] for name in names]
    print(markdown_table(["", *(f"{search}, dB" for search in SEARCHES)], rows))
    print(f"\n{file.name}, {count:,} weights, groups of {group_size}, {scale} scales, nearest.")


if __name__ == "__main__":
    typer.run(main)
