"""Weight and activation statistics of the reference transformer: ``python -m fp4dit_ao.reference.statistics --help``.

Conclusions about number formats hold only for tensors distributed as in real diffusion transformers: bell-shaped, often
heavy-tailed weights, and activations whose size differs from token to token. Printed per kind of linear layer:

*excess kurtosis* of the weights, mean((w - mean)^4) / variance^2 - 3: -1.2 for uniform, 0 for normal, more for heavy
tails;

*spread of token maxima*: of the largest magnitude in each token of the layer's input, over denoising trajectories, the
99th percentile divided by the median: 1 if every token could share one scale.
"""

import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch import Tensor, nn

from fp4dit_ao import reference
from fp4dit_ao.reference.accuracy import batches, spread_out

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Floats = NDArray[np.float32]

KINDS = {
    r"attn1\.to_[qkv]$": "self-attention q, k, v",
    r"attn1\.to_out\.0$": "self-attention out",
    r"attn2\.to_q$": "cross-attention q",
    r"attn2\.to_[kv]$": "cross-attention k, v",
    r"attn2\.to_out\.0$": "cross-attention out",
    r"ff\.net\.0\.proj$": "feed-forward in (before GELU)",
    r"ff\.net\.2$": "feed-forward out (after GELU)",
    r"adaln_single\.linear$": "adaLN",
    r"timestep_embedder": "timestep embedder",
    r"caption_projection": "caption projection",
    r"^proj_out$": "final projection",
}


def kind_of(name: str) -> str:
    """Kind (row of the table) of the linear layer ``name`` of a PixArt transformer."""
    return next((kind for pattern, kind in KINDS.items() if re.search(pattern, name)), "other")


def excess_kurtosis(weight: Tensor) -> float:
    """Fourth standardised moment of all elements, minus 3."""
    w = weight.detach().double().flatten()
    w = w - w.mean()
    return float((w**4).mean() / (w**2).mean() ** 2 - 3)


def token_maxima(pipe: "DiffusionPipeline", prompts: list[str], **call: Any) -> dict[str, Floats]:
    """Largest magnitude of every input token seen while generating ``prompts``, by name of the linear layer.

    A row of the last dimension is a token; the adaLN and timestep layers have one per image.
    """
    found: dict[str, list[Tensor]] = defaultdict(list)

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name].append(args[0].detach().abs().amax(dim=-1).flatten().float())

        return hook

    linears = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear)}
    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    try:
        for _ in batches(pipe, prompts, range(len(prompts)), **call):
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(found[name]).numpy() for name in linears}


def table(transformer: nn.Module, maxima: dict[str, Floats]) -> str:
    """Markdown table with a row per kind of layer; medians over its layers, with the extremes in brackets."""
    rows: dict[str, list[tuple[float, float]]] = defaultdict(list)
    shapes: dict[str, str] = {}
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            tokens = maxima[name]
            spread = float(np.quantile(tokens, 0.99) / np.median(tokens))
            rows[kind_of(name)].append((excess_kurtosis(module.weight), spread))
            shapes.setdefault(kind_of(name), f"{module.in_features} → {module.out_features}")
    lines = [
        "| layers | count | features | excess kurtosis of weights | token maxima, p99 / median |",
        "|---|---|---|---|---|",
    ]
    for kind in dict.fromkeys([*KINDS.values(), "other"]):
        if kind in rows:
            cells = [_median_and_range(values) for values in zip(*rows[kind], strict=True)]
            lines.append(f"| {kind} | {len(rows[kind])} | {shapes[kind]} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _median_and_range(values: tuple[float, ...]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(transformer: nn.Module, maxima: dict[str, Floats], path: Path) -> None:
    """Draws the weights of each kind against the normal distribution, and the token maxima of each kind."""
    from matplotlib.figure import Figure

    weights: dict[str, list[Tensor]] = defaultdict(list)
    tokens: dict[str, list[Floats]] = defaultdict(list)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            w = module.weight.detach().float().flatten()
            weights[kind_of(name)].append((w - w.mean()) / w.std())
            tokens[kind_of(name)].append(maxima[name] / np.median(maxima[name]))
    kinds = [kind for kind in KINDS.values() if kind in weights]
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(-8, 8, 97)
    middle = (edges[1:] + edges[:-1]) / 2
    for kind in kinds:
        density, _ = np.histogram(torch.cat(weights[kind]).numpy(), bins=edges, density=True)
        left.plot(middle, np.where(density > 0, density, np.nan), linewidth=1, label=kind)
    left.plot(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), "k--", linewidth=1, label="normal")
    left.set(title="weights", xlabel="standard deviations of the layer", ylabel="density", yscale="log", ylim=(1e-6, 1))
    left.legend(fontsize=6)
    quantiles = [0.01, 0.25, 0.5, 0.75, 0.99]
    for row, kind in enumerate(reversed(kinds)):
        low, first, middle_value, third, high = np.quantile(np.concatenate(tokens[kind]), quantiles)
        right.plot([low, high], [row, row], color="tab:blue", linewidth=1)
        right.plot([first, third], [row, row], color="tab:blue", linewidth=5)
        right.plot(middle_value, row, "k|")
    right.set_yticks(range(len(kinds)), list(reversed(kinds)), fontsize=7)
    right.set(title="token maxima: 1, 25, 50, 75, 99 %", xlabel="relative to the layer's median", xscale="log")
    right.grid(alpha=0.3, axis="x", which="both")
    figure.savefig(path, dpi=90)


def main(
    prompts: Annotated[int, typer.Option(help="How many prompts, spread evenly over all.")] = 16,
    model: Annotated[Path | None, typer.Option(help="PixArt pipeline folder; the shipped one if not given.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the distributions into this PNG.")] = None,
) -> None:
    """Prints the table, and draws the distributions if asked."""
    from diffusers import PixArtSigmaPipeline

    pipe = PixArtSigmaPipeline.from_pretrained(model or reference.path(), torch_dtype=torch.float32)
    maxima = token_maxima(pipe, [reference.prompts()[i] for i in spread_out(prompts)])
    print(table(pipe.transformer, maxima))
    if picture is not None:
        draw(pipe.transformer, maxima, picture)
        print(f"distributions: {picture}")


if __name__ == "__main__":
    typer.run(main)
