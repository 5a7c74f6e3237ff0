"""Trains the reference pipeline from scratch: ``python -m fp4dit_ao.reference.train --help``.

Three stages, each resumable (Ctrl-C or kill, then the same command again):

``autoencoder``  64 px pictures to 16 x 16 x 4 latents (L1 + edges + coarse colours + a little KL).
``transformer``  a PixArt diffusion transformer and its T5 text encoder, jointly, v-prediction in latent space.
``export``       the exponential averages, in half precision, as a folder that ``PixArtSigmaPipeline`` loads.

Weights start from a normal distribution, the adaLN and every output projection from zero: trained diffusion
transformers have bell-shaped weights, and conclusions about number formats depend on that shape.
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, PixArtSigmaPipeline
from torch import Tensor

from fp4dit_ao.reference.architecture import (
    GENERATION,
    TEXT_LENGTH,
    TextToLatent,
    build_autoencoder,
    build_model,
    load_tokenizer,
    scheduler,
)
from fp4dit_ao.reference.data import Emoji, read_package, write_sheet
from fp4dit_ao.reference.saving import save_pipeline
from fp4dit_ao.reference.training_run import Run

app = typer.Typer(add_completion=False, help=__doc__)
DROP_TEXT = 0.1
"""Fraction of training prompts replaced by the empty text, for classifier-free guidance."""
USE_ALIAS = 0.2
"""Fraction of training prompts replaced by the second wording."""

Package = Annotated[Path, typer.Option(help="Unpacked emoji-datasource-google.")]
Work = Annotated[Path, typer.Option(help="Folder for training state.")]


def pixels(emoji: list[Emoji]) -> Tensor:
    """Pictures as float32 ``(n, 3, 64, 64)`` in [-1, 1]."""
    stacked = torch.stack([torch.from_numpy(item.image.copy()) for item in emoji])
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> Tensor:
    """Differences between neighbouring pixels, flattened; they are large where a blurred picture is wrong."""
    return torch.cat([(x[..., 1:, :] - x[..., :-1, :]).flatten(1), (x[..., 1:] - x[..., :-1]).flatten(1)], 1)


@app.command()
def autoencoder(
    package: Package, work: Work, steps: int = 2700, batch: int = 8, lr: float = 1e-3, seed: int = 0
) -> None:
    """Train the autoencoder."""
    torch.manual_seed(seed)
    images = pixels(read_package(package))
    model = build_autoencoder()
    run = Run(work / "autoencoder", model, lr, 0.0, seed)
    for generator in run.steps(steps, decay=0.4):
        x = images[torch.randint(len(images), (batch,), generator=generator)]
        if torch.rand((), generator=generator) < 0.5:
            x = x.flip(-1)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            y = model.decode(posterior.mean + posterior.std * noise).sample
        y = y.float()
        loss = F.l1_loss(y, x) + 0.5 * F.l1_loss(edges(y), edges(x)) + 1e-5 * posterior.kl().float().mean() / 16
        # with L1 alone the median colour wins: green and purple things came out brown
        loss = loss + 4 * F.mse_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        loss.backward()  # type: ignore[no-untyped-call]
        run.loss = loss.item()


@torch.no_grad()
def encode_all(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Posterior means of ``images``: float32 ``(n, 4, 16, 16)``."""
    return torch.cat([model.encode(part).latent_dist.mean for part in torch.split(images, 32)])


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Mean over ``images`` of the peak signal-to-noise ratio of decode(encode(image)), in dB."""
    reconstructed = torch.cat([model.decode(part).sample for part in torch.split(encode_all(model, images), 32)])
    error = ((reconstructed.clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def finished_autoencoder(work: Path, images: Tensor) -> AutoencoderKL:
    """Averaged autoencoder whose latents have mean 0 in each channel and variance 1 over all channels together.

    The 1 x 1 convolutions on either side of the latent absorb the scale and shift exactly. Channels keep their relative
    sizes: one of them carries little information, and scaling it up would make the transformer learn noise.
    """
    vae: AutoencoderKL = Run(work / "autoencoder", build_autoencoder(), 0.0, 0.0, 0).averaged()
    latents = encode_all(vae, images)
    shift = latents.mean((0, 2, 3))
    scale = (latents - shift.view(-1, 1, 1)).std()
    channels = len(shift)
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= scale
    into.bias[:channels] = (into.bias[:channels] - shift) / scale
    into.bias[channels:] -= 2 * scale.log()  # the second half are log variances
    back.bias += back.weight[:, :, 0, 0] @ shift
    back.weight *= scale
    vae.register_to_config(scaling_factor=1.0)
    return vae


@app.command()
def transformer(
    package: Package, work: Work, steps: int = 7500, batch: int = 32, lr: float = 1e-3, seed: int = 0
) -> None:
    """Train the transformer and its text encoder on the latents of the finished autoencoder."""
    torch.manual_seed(seed)
    emoji = read_package(package)
    images = pixels(emoji)
    mean = encode_all(finished_autoencoder(work, images), images)
    tokenizer = load_tokenizer(work, emoji)
    names, aliases, empty = (
        tokenizer(texts, padding="max_length", truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        for texts in ([item.name for item in emoji], [item.alias for item in emoji], [""])
    )
    noise_scheduler = scheduler()
    alphas = noise_scheduler.alphas_cumprod
    model = build_model(len(tokenizer))
    run = Run(work / "transformer", model, lr, 0.01, seed)
    for generator in run.steps(steps, decay=0.4):
        pick = torch.randint(len(emoji), (batch,), generator=generator)
        draw = torch.rand(batch, 1, generator=generator)
        ids, mask = (
            torch.where(draw < DROP_TEXT + USE_ALIAS, aliases[key][pick], names[key][pick]).where(
                draw >= DROP_TEXT, empty[key]
            )
            for key in ("input_ids", "attention_mask")
        )
        latent = mean[pick]
        noise = torch.randn(latent.shape, generator=generator)
        # stratified: one timestep from each of `batch` equal parts, which lowers the variance of the loss
        part = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timestep = (part * 1000).long().clamp(max=999)
        signal, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (alphas[timestep], 1 - alphas[timestep]))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(signal * latent + sigma * noise, timestep, ids, mask)
        loss = F.mse_loss(output.float(), signal * noise - sigma * latent)
        loss.backward()  # type: ignore[no-untyped-call]
        run.loss = loss.item()


def draw_history(runs: dict[str, Run], path: Path) -> None:
    """Draws the loss curves of the stages side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axes, (name, run) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        axes.plot([step for step, _ in run.history], [loss for _, loss in run.history], linewidth=1)
        axes.set(title=f"{name}: {run.step} steps, {run.seconds / 60:.0f} min", xlabel="step", ylabel="loss (smoothed)")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=90)


@app.command()
def export(
    package: Package, work: Work, out: Annotated[Path, typer.Option()] = Path(__file__).parent, seed: int = 0
) -> None:
    """Write the pipeline folder, the sprite sheet and the record of the run."""
    emoji = read_package(package)
    vae = finished_autoencoder(work, pixels(emoji))
    psnr = reconstruction_psnr(vae, pixels(emoji))
    tokenizer = load_tokenizer(work, emoji)
    run = Run(work / "transformer", build_model(len(tokenizer)), 0.0, 0.0, seed)
    model = run.averaged()
    assert isinstance(model, TextToLatent)
    pipe = PixArtSigmaPipeline(tokenizer, model.text_encoder, vae, model.transformer, scheduler())
    save_pipeline(pipe, torch.float16, GENERATION, out)
    write_sheet(emoji, out)
    runs = {"autoencoder": Run(work / "autoencoder", build_autoencoder(), 0.0, 0.0, seed), "transformer": run}
    draw_history(runs, out / "training.png")
    record: dict[str, dict[str, object]] = {
        name: {"steps": r.step, "minutes": round(r.seconds / 60, 1), "seed": r.seed, "loss": r.history}
        for name, r in runs.items()
    }
    record["autoencoder"]["psnr"] = round(psnr, 2)
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
