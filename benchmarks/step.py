"""One denoising step of a PixArt-XL-shaped transformer, random weights: ``python -m benchmarks.step``.

Guidance batch 2. Every variant runs once a round, in turns; printed are medians over the rounds, ratios first. Fewer
``--layers`` than PixArt-XL's 28 leave the ratios of a step as they are, and save compile time. Writes ``step.json``.
"""

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from tqdm import tqdm  # type: ignore[import-untyped]

from fp4dit_ao import FP4DiTQuantizer, QuantConfig, capture, lower
from fp4dit_ao.environment import environment, one_line
from fp4dit_ao.evaluate import markdown_table, write_text

WIDTH = {"text tokens": 300, "caption channels": 4096}


def transformer(layers: int, pixels: int) -> nn.Module:
    """PixArt-XL's width; its parameters are 0.02 times normal, as after initialisation."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_layers=layers,
        sample_size=pixels // 8,
        caption_channels=WIDTH["caption channels"],
        use_additional_conditions=False,
    )
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    return model.eval().requires_grad_(False)


def sample(pixels: int, dtype: torch.dtype) -> dict[str, Any]:
    """What a pipeline passes in one step."""
    torch.manual_seed(1)
    return {
        "hidden_states": torch.randn(2, 4, pixels // 8, pixels // 8, dtype=dtype),
        "encoder_hidden_states": torch.randn(2, WIDTH["text tokens"], WIDTH["caption channels"], dtype=dtype),
        "timestep": torch.tensor([500, 500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


@torch.no_grad()
def quantized(model: nn.Module, inputs: dict[str, Any], recipe: str) -> nn.Module:
    """Nearest rounding: what a step costs does not depend on how weights were rounded."""
    prepared = prepare_pt2e(capture(model, inputs), FP4DiTQuantizer().set_global(QuantConfig.from_name(recipe)))
    return lower(convert_pt2e(prepared, fold_quantize=False))


def nbytes(model: nn.Module) -> int:
    """Of all parameters and buffers, packed ones as they are stored."""
    total = 0
    for x in (*model.parameters(), *model.buffers()):
        parts = [x.qdata, x.scale] if hasattr(x, "qdata") else [x]
        total += sum(part.nbytes for part in parts)
    return total


def main(
    recipe: str = "w4a6",
    pixels: int = 512,
    layers: int = 28,
    rounds: int = 7,
    eager: Annotated[bool, typer.Option(help="Time the uncompiled models, too.")] = True,
    out: Path = Path("benchmarks/results"),
) -> None:
    """Measure and print."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models: dict[str, tuple[nn.Module, dict[str, Any]]] = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        models[name] = transformer(layers, pixels).to(device, dtype), sample(pixels, dtype)
    half, inputs = models["bfloat16"]
    models[recipe] = quantized(half, pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs), recipe), inputs
    runs: dict[str, Callable[[], object]] = {}
    for name, (model, given) in models.items():
        given = pytree.tree_map_only(Tensor, lambda x: x.to(device), given)
        if eager and name != recipe:
            runs[name] = lambda model=model, given=given: model(**given)  # type: ignore[misc]
        compiled = torch.compile(model)
        runs[f"{name}, compiled"] = lambda model=compiled, given=given: model(**given)  # type: ignore[misc]
    gc.collect()
    first: dict[str, float] = {}
    seconds = {name: list[float]() for name in runs}
    with torch.no_grad(), tqdm(total=len(runs) * (rounds + 1), desc="steps") as bar:
        for number in range(rounds + 1):
            for name, run in runs.items():
                bar.set_postfix_str(name)
                began = time.perf_counter()
                run()
                if device == "cuda":
                    torch.cuda.synchronize()
                took = time.perf_counter() - began
                if number == 0:
                    first[name] = took
                else:
                    seconds[name].append(took)
                bar.update()
    base = "bfloat16, compiled"
    lines = []
    for name in runs:
        ratios = [b / own for b, own in zip(seconds[base], seconds[name], strict=True)]
        size = nbytes(models[name.removesuffix(", compiled")][0])
        lines.append(
            [name, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
             f"{statistics.median(seconds[name]):.2f}", f"{size / 1e6:.0f}", f"{first[name]:.0f}"]
        )  # fmt: skip
    print(markdown_table(["", f"speed against {base}", "s / step", "weights, MB", "first call, s"], lines))
    settings = {"recipe": recipe, "pixels": pixels, "layers": layers, "rounds": rounds} | WIDTH
    print(
        f"\n{', '.join(f'{key} {value}' for key, value in settings.items())}; guidance batch 2, in turns. {one_line()}"
    )
    result = {"settings": settings, "environment": environment(), "first": first, "seconds": seconds}
    write_text(out / "step.json", json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
