"""Trains the composition pipeline from scratch: ``python -m fp4dit_ao.reference.compositions.train --help``.

Made for ten minutes of one GPU: pictures and prompts are made there, the transformer's blocks are compiled, matrix
products are bfloat16, and the schedule follows the clock. Killed at any time, the folder ``--out`` holds the averaged
weights of the last save, for ``python -m fp4dit_ao.reference.compositions.pack``; the same command again continues from
``--work``.
"""

import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor, nn

from fp4dit_ao.reference.architecture import TextToLatent
from fp4dit_ao.reference.compositions.architecture import LAYERS, WIDTH, build_model, build_tokenizer
from fp4dit_ao.reference.compositions.scenes import Scenes
from fp4dit_ao.reference.compositions.stickers import Painter
from fp4dit_ao.reference.compositions.timed_run import TimedRun
from fp4dit_ao.reference.compositions.weight_files import write_weights
from fp4dit_ao.util.atomic_files import write_text

DROP_TEXT = 0.1
"""Fraction of training prompts replaced by the empty text, for classifier-free guidance."""
CLOSEST = 0.1
"""Noise level from which the weight of the loss rises no further."""


def noise_levels(draws: Tensor) -> Tensor:
    """Noise levels in (0, 1) from stratified uniform ``draws``: most above the middle, where composition and shapes
    are decided; a fifth of them uniform, since sampling begins at pure noise."""
    count = len(draws) // 5
    normal = torch.special.ndtri(draws[count:].clamp(1e-5, 1 - 1e-5))
    return torch.cat([draws[:count], torch.sigmoid(0.6 + 1.2 * normal)]).clamp(1e-3, 0.999)


def stratified(n: int, generator: torch.Generator) -> Tensor:
    """One uniform number from each of ``n`` equal parts of (0, 1), in random order; lowers the variance of the loss."""
    device = generator.device
    order = torch.rand(n, generator=generator, device=device).argsort()
    return (order + torch.rand(n, generator=generator, device=device)) / n


@dataclass
class Objective:
    """Loss of one random batch: squared error of the predicted picture, weighted as that of the predicted velocity."""

    model: TextToLatent
    scenes: Scenes
    painter: nn.Module
    batch: int

    def __call__(self, generator: torch.Generator) -> Tensor:
        device, n = generator.device, self.batch
        with torch.no_grad():
            scene = self.scenes.sample(n, generator)
            pictures = self.painter(self.scenes.place(scene, generator))
            ids, mask = self.scenes.tokens(scene)
            dropped = torch.rand(n, 1, generator=generator, device=device) < DROP_TEXT
            first = torch.arange(ids.shape[1], device=device) == 0
            ids = torch.where(dropped, self.scenes.end * first, ids)
            mask = torch.where(dropped, first.long(), mask)
            level = noise_levels(stratified(n, generator))
            share = level.view(-1, 1, 1, 1)
            noise = torch.randn(pictures.shape, generator=generator, device=device)
            noisy = (1 - share) * pictures + share * noise
        with torch.autocast(device.type, torch.bfloat16):
            output = self.model(noisy, (1000 * level).long(), ids, mask)
        error = (output.float() - pictures).square().mean((1, 2, 3))
        return (error / level.clamp(min=CLOSEST).square()).mean()


def compile_parts(model: TextToLatent, painter: nn.Module) -> None:
    """Compiles what is called with one shape: one block stands for all, so that compiling takes seconds."""
    for part in (model.text_encoder, painter, *model.transformer.transformer_blocks):
        part.compile(dynamic=False)


def main(
    out: Annotated[Path, typer.Option(help="Folder for averaged weights and the record, overwritten at every save.")],
    work: Annotated[Path, typer.Option(help="Folder for training state (fourteen bytes a weight).")],
    minutes: Annotated[float, typer.Option(help="Time for everything but imports, all sessions together.")] = 6.0,
    device: str = "cuda",
    batch: int = 512,
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    width: Annotated[int, typer.Option(help="Width of the transformer, in 128s.")] = WIDTH,
    layers: int = LAYERS,
    save_every: Annotated[float, typer.Option(help="Seconds between two saves.")] = 60.0,
    compiled: bool = True,
    seed: int = 0,
) -> None:
    """Train on random scenes without held-out combinations, for a given time."""
    began = time.monotonic()
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = build_tokenizer()
    scenes, painter = Scenes(tokenizer).to(device), Painter().to(device)
    model = build_model(len(tokenizer), width, layers).to(device)
    run = TimedRun(work, model, lr, weight_decay, seed)
    run.seconds += time.monotonic() - began
    if compiled:
        compile_parts(model, painter)
    recipe = {
        "batch": batch,
        "lr": lr,
        "weight_decay": weight_decay,
        "width": width,
        "layers": layers,
        "minutes": minutes,
    }
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    print(f"{sum(p.numel() for p in model.transformer.parameters()):,} parameters, on {where}", flush=True)

    def publish() -> None:
        write_weights(run.ema, out, run.step)
        record = recipe | {"step": run.step, "seconds": round(run.seconds), "seed": seed, "machine": where}
        record |= {"torch": torch.__version__, "loss": run.history}
        write_text(out / "training.json", json.dumps(record) + "\n")
        print(f"saved step {run.step} to {out}", flush=True)

    run.train_for(60 * minutes, save_every, Objective(model, scenes, painter, batch), publish)


if __name__ == "__main__":
    typer.run(main)
