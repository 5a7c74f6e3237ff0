"""Trains the reference pipeline from nothing: ``python -m fp4dit_ao.reference.train --help``.

Three stages, each resumable (Ctrl-C or kill, then the same command again):

``autoencoder``  64 px pictures to 16 x 16 x 4 latents (L1 + edges + coarse colours + a little KL).
``transformer``  a PixArt diffusion transformer and its T5 text encoder, jointly, v-prediction in latent space.
``export``       the exponential averages, in half precision, as a folder that ``PixArtSigmaPipeline`` loads.

Weights start from a normal distribution, the adaLN and every output projection from zero: trained diffusion
transformers have bell-shaped weights, and conclusions about number formats depend on that shape.
"""

import json
import math
import platform
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

from fp4dit_ao import _compat
from fp4dit_ao.reference.data import Emoji, read_package, write_sheet
from fp4dit_ao.util.atomic_files import write_text

app = typer.Typer(add_completion=False, help=__doc__)
TEXT_LENGTH = 16
DROP_TEXT = 0.1
USE_ALIAS = 0.2
SAVE_EVERY = 500
EMA = 0.999

Package = Annotated[Path, typer.Option(help="Unpacked emoji-datasource-google.")]
Work = Annotated[Path, typer.Option(help="Folder for training state.")]


def build_autoencoder() -> AutoencoderKL:
    """Three levels: 64 px to 16 x 16 latents of 4 channels."""
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=64, norm_num_groups=16, layers_per_block=1,
        block_out_channels=(32, 64, 128), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )  # fmt: skip


def build_transformer() -> PixArtTransformer2DModel:
    """7 M parameters; every linear layer's input is a multiple of 128 wide, the group size of the paper's weights."""
    model = PixArtTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=4, num_layers=6,
        cross_attention_dim=256, sample_size=16, patch_size=2, caption_channels=256, use_additional_conditions=False,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(2 / (module.in_features + module.out_features)))
            nn.init.zeros_(module.bias)
    nn.init.normal_(model.pos_embed.proj.weight, std=math.sqrt(1 / 16))
    nn.init.zeros_(model.pos_embed.proj.bias)
    closed = [model.adaln_single.linear, model.proj_out, *(block.attn2.to_out[0] for block in model.transformer_blocks)]
    for linear in closed:
        nn.init.zeros_(linear.weight)
    return model


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    """Two layers, as wide as the transformer."""
    config = T5Config(
        vocab_size=vocabulary, d_model=256, d_kv=64, d_ff=512, num_layers=2, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5EncoderModel(config)


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A Unigram tokenizer over the emoji names, in T5's own wrapper (pad 0, end 1, unknown 2)."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=1000, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    scores: dict[str, float] = dict(json.loads(tokenizer.to_str())["model"]["vocab"])
    # so few texts leave the trainer cutting "monkey" in three: every whole word becomes a piece of its own
    words = Counter(word for text in texts for word in text.lower().split())
    for word, count in sorted(words.items()):
        scores["▁" + word] = math.log(count / words.total())
    return T5TokenizerFast(vocab=list(scores.items()), extra_ids=0, model_max_length=TEXT_LENGTH)


def load_tokenizer(work: Path, emoji: list[Emoji]) -> PreTrainedTokenizerFast:
    """The run's own tokenizer: built once, then read back, so that no other version can assign other ids."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        build_tokenizer([item.name for item in emoji] + [item.alias for item in emoji]).save_pretrained(folder)
    tokenizer: PreTrainedTokenizerFast = T5TokenizerFast.from_pretrained(folder)
    return tokenizer


def scheduler() -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of second order, as PixArt-Sigma; the transformer is trained on the same noise levels."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
        prediction_type="v_prediction", algorithm_type="dpmsolver++", solver_order=2,
    )  # fmt: skip


class Run:
    """Model, averages, optimiser and history of one stage, saved as safetensors and JSON so that it can resume."""

    def __init__(self, folder: Path, model: nn.Module, lr: float, weight_decay: float, seed: int):
        self.folder, self.model, self.lr, self.seed = folder, model, lr, seed
        self.params = dict(model.named_parameters())
        self.ema = {name: p.detach().clone() for name, p in self.params.items()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.step, self.seconds = 0, 0.0
        self.loss = math.nan  # set by the training loop in every step
        self.smooth: float | None = None
        self.history: list[list[float]] = []
        if (folder / "state.json").exists():
            self._load()

    def _load(self) -> None:
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        self.step, self.seconds, self.history = state["step"], state["seconds"], state["history"]
        self.smooth = state.get("smooth")
        tensors = load_file(self.folder / f"state-{self.step}.safetensors")
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(tensors[f"model.{name}"])
                self.ema[name] = tensors[f"ema.{name}"]
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": tensors[f"m.{name}"],
                    "exp_avg_sq": tensors[f"v.{name}"],
                }

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for name, p in self.params.items():
            state = self.optimizer.state[p]
            tensors |= {f"model.{name}": p.detach(), f"ema.{name}": self.ema[name]}
            tensors |= {f"m.{name}": state["exp_avg"], f"v.{name}": state["exp_avg_sq"]}
        save_file({k: v.contiguous() for k, v in tensors.items()}, self.folder / f"state-{self.step}.safetensors")
        record: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "seed": self.seed, "smooth": self.smooth}
        record |= {"machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        record |= {"history": self.history}
        write_text(self.folder / "state.json", json.dumps(record))
        for old in self.folder.glob("state-*.safetensors"):
            if old.name != f"state-{self.step}.safetensors":
                old.unlink()

    def steps(self, total: int, decay: float) -> Iterator[torch.Generator]:
        """Yields a generator seeded by the step; after each yield the gradients are applied. The rate warms up over
        200 steps, stays, and falls linearly to zero over the last ``decay`` fraction."""
        bar = tqdm(total=total, initial=self.step, desc=self.folder.name, mininterval=5)
        while self.step < total:
            start = time.monotonic()
            rate = min(1.0, (self.step + 1) / 200, (total - self.step) / max(1, total * decay))
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * rate
            yield torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1
            weight = 1 - min(EMA, (self.step + 1) / (self.step + 10))
            with torch.no_grad():
                _compat.lerp_(list(self.ema.values()), [p.detach() for p in self.params.values()], weight)
            self.seconds += time.monotonic() - start
            self.smooth = self.loss if self.smooth is None else 0.98 * self.smooth + 0.02 * self.loss
            if self.step % 20 == 0:
                self.history.append([self.step, round(self.smooth, 5)])
            bar.set_postfix(loss=f"{self.smooth:.4f}", refresh=False)
            bar.update()
            if self.step % SAVE_EVERY == 0 or self.step == total:
                self.save()
        bar.close()

    def averaged(self) -> nn.Module:
        """The model with its averages in place of its weights."""
        with torch.no_grad():
            for name, p in self.params.items():
                p.copy_(self.ema[name])
        return self.model.eval()


def pixels(emoji: list[Emoji]) -> Tensor:
    """float32 ``(n, 3, 64, 64)`` in [-1, 1]."""
    stacked = torch.stack([torch.from_numpy(item.image.copy()) for item in emoji])
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


def edges(x: Tensor) -> Tensor:
    """Differences between neighbouring pixels, flattened: what a blurred picture gets wrong."""
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
        # L1 alone is content with a median colour: it drew green and purple things brown
        loss = loss + 4 * F.mse_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
        loss.backward()  # type: ignore[no-untyped-call]
        run.loss = loss.item()


@torch.no_grad()
def encode_all(model: AutoencoderKL, images: Tensor) -> Tensor:
    """The posterior means of ``images``: float32 ``(n, 4, 16, 16)``."""
    return torch.cat([model.encode(part).latent_dist.mean for part in torch.split(images, 32)])


@torch.no_grad()
def reconstruction_psnr(model: AutoencoderKL, images: Tensor) -> float:
    """Mean over ``images`` of the peak signal-to-noise ratio of decode(encode(image)), in dB."""
    reconstructed = torch.cat([model.decode(part).sample for part in torch.split(encode_all(model, images), 32)])
    error = ((reconstructed.clamp(-1, 1) - images) / 2).square().flatten(1).mean(1)
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def finished_autoencoder(work: Path, images: Tensor) -> AutoencoderKL:
    """The averaged autoencoder, each channel of its latents brought to mean 0, and all together to variance 1.

    The 1 x 1 convolutions on either side of the latent take this up exactly. Channels keep their relative sizes: one of
    them says next to nothing, and scaling it up would have the transformer learn noise.
    """
    vae: Any = Run(work / "autoencoder", build_autoencoder(), 0.0, 0.0, 0).averaged()
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
    return vae  # type: ignore[no-any-return]


class TextToLatent(nn.Module):
    """Text encoder and transformer as one module, so that they train as one."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.text_encoder = build_text_encoder(vocabulary)
        self.transformer = build_transformer()

    def forward(self, noisy: Tensor, timestep: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        text = self.text_encoder(ids, attention_mask=mask)[0]
        output: Tensor = self.transformer(
            noisy, encoder_hidden_states=text, timestep=timestep, encoder_attention_mask=mask,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False,
        )[0]  # fmt: skip
        return output


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
    model = TextToLatent(len(tokenizer))
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


GENERATION = {
    "num_inference_steps": 20, "guidance_scale": 1.5, "height": 64, "width": 64, "use_resolution_binning": False,
    "max_sequence_length": TEXT_LENGTH, "clean_caption": False,
}  # fmt: skip
"""How the trained pipeline is meant to be called; written beside it as ``generation.json``."""


def draw_history(runs: dict[str, Run], path: Path) -> None:
    """The loss curve of each stage, side by side."""
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
    run = Run(work / "transformer", TextToLatent(len(tokenizer)), 0.0, 0.0, seed)
    model: Any = run.averaged()
    pipe = PixArtSigmaPipeline(tokenizer, model.text_encoder.half(), vae.half(), model.transformer.half(), scheduler())
    pipe.save_pretrained(out, safe_serialization=True)
    config = out / "text_encoder" / "config.json"  # transformers, unlike diffusers, would otherwise load it as half
    config.write_text(config.read_text(encoding="utf-8").replace('"float16"', '"float32"'), encoding="utf-8")
    write_sheet(emoji, out)
    (out / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n", encoding="utf-8")
    runs = {"autoencoder": Run(work / "autoencoder", build_autoencoder(), 0.0, 0.0, seed), "transformer": run}
    draw_history(runs, out / "training.png")
    record: dict[str, Any] = {
        name: {"steps": r.step, "minutes": round(r.seconds / 60, 1), "seed": r.seed, "loss": r.history}
        for name, r in runs.items()
    }
    record["autoencoder"]["psnr"] = round(psnr, 2)
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
