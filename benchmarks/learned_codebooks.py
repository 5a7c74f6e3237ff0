"""Codebook sets learned from weights, against the built-in set: ``python -m benchmarks.learned_codebooks FILE.safetensors``.

Alternates the search of scales and codebooks with least-squares levels (k-means with shared codebooks), each level rounded to
the nearest of the 79 integers that int8 and E4M3 both hold: one set for all weights, and one for each weight. It starts at the
built-in set, and at random distortions of it. Prints signal-to-quantization-noise ratios; the default file is the reference
transformer's.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from fp4dit_ao import reference
from fp4dit_ao.formats import CODEBOOK_SETS, CodebookSet
from fp4dit_ao.formats.codebook_groups import BOOKS, EXACT_LEVELS, LEVELS
from fp4dit_ao.observers import codebook_search

GROUP = 128


def main(
    file: Annotated[Path | None, typer.Argument(help="safetensors of a float model.")] = None,
    start: Annotated[str, typer.Option(help="Name of the set to start at, and to compare with.")] = "nf4_groups",
    every: Annotated[int, typer.Option(min=1, help="Take every so many weights.")] = 6,
    distortions: Annotated[int, typer.Option(min=0, help="Random starts besides.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Of search and least squares.")] = 8,
) -> None:
    """Prints the comparison."""
    file = file or reference.path() / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = _weights(file)[::every]
    built_in = CODEBOOK_SETS[start]
    base = [_rounded(weight, built_in)[0] for weight in weights]
    with tqdm(total=(1 + distortions) * rounds * 2, desc="learning") as bar:
        starts = [built_in, *(_distorted(built_in, seed) for seed in range(distortions))]
        together = [max(_mean(sqnr) for sqnr in _learned(weights, first, rounds, bar)) for first in starts]
        alone = []
        for weight, before in zip(weights, base, strict=True):
            best = max(sqnr for first in starts for [sqnr] in _learned([weight], first, rounds, None))
            alone.append(max(best, before))
            bar.update((1 + distortions) * rounds / len(weights))
    print(f"{start}: {_mean(base):.2f} dB")
    print(
        f"one learned set: {max(together) - _mean(base):+.2f} dB ({', '.join(f'{x:.2f}' for x in together)} by start)"
    )
    print(f"a learned set for each weight: {_mean(alone) - _mean(base):+.2f} dB")
    count = sum(weight.numel() for weight in weights)
    print(f"{file.name}, {len(weights)} weights, {count:,} numbers, groups of {GROUP}, nearest.")


def _weights(file: Path) -> list[Tensor]:
    """Two-dimensional weights that groups divide, without embeddings."""
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.endswith(".weight") and "embed" not in name]  # noqa: SIM118
        found = [opened.get_tensor(name).float() for name in names]
    return [x for x in found if x.ndim == 2 and x.shape[1] % GROUP == 0]


def _learned(weights: Sequence[Tensor], books: CodebookSet, rounds: int, bar: "tqdm[None] | None") -> list[list[float]]:
    """SQNR of every weight in every round, the start's first."""
    found = []
    for _ in range(rounds):
        rounded = [_rounded(weight, books) for weight in weights]
        found.append([sqnr for sqnr, *_ in rounded])
        products, squares = torch.zeros(BOOKS * LEVELS).double(), torch.zeros(BOOKS * LEVELS).double()
        for weight, (_, scale, entry) in zip(weights, rounded, strict=True):
            power = weight.square().mean().double()  # every weight counts alike, whatever its size
            c, w = scale[:, None].expand_as(weight).flatten().double(), weight.flatten().double()
            products.index_add_(0, entry, c * w / power)
            squares.index_add_(0, entry, c * c / power)
        levels = torch.where(squares > 0, products / squares.clamp(min=1e-30), books.tensor().flatten().double())
        books = _exact("learned", levels.float())
        if bar is not None:
            bar.update(1)
    return found


def _rounded(weight: Tensor, books: CodebookSet) -> tuple[float, Tensor, Tensor]:
    """SQNR in dB of nearest rounding, the row scales, and for every number the entry of the set that it takes."""
    scale, index = codebook_search.search(weight, books, GROUP)
    codes = books.encode(weight / scale[:, None], index)
    error = books.decode(codes, index) * scale[:, None] - weight
    entry = index.long()[..., None] * LEVELS + codes.unflatten(1, (index.shape[1], -1)).long()
    return 10 * math.log10(float(weight.square().sum() / error.square().sum())), scale, entry.flatten()


def _distorted(books: CodebookSet, seed: int) -> CodebookSet:
    """Each codebook bent to another power, and its positive half scaled, by some 10 %."""
    g = torch.Generator().manual_seed(seed)
    levels = books.tensor().float()
    largest = levels.abs().amax(1, keepdim=True)
    power, skew = torch.exp(0.1 * torch.randn(BOOKS, 1, generator=g)), 1 + 0.1 * torch.randn(BOOKS, 1, generator=g)
    bent = levels.sign() * (levels.abs() / largest) ** power * largest
    return _exact("distorted", torch.where(bent > 0, bent * skew, bent).flatten())


def _exact(name: str, levels: Tensor) -> CodebookSet:
    """Set of the nearest of the 79 integers, each codebook in order."""
    allowed = torch.tensor(EXACT_LEVELS).float()
    nearest = allowed[(levels[:, None] - allowed).abs().argmin(1)].reshape(BOOKS, LEVELS).sort(1).values
    return CodebookSet(name, tuple(tuple(int(level) for level in book) for book in nearest))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    typer.run(main)
