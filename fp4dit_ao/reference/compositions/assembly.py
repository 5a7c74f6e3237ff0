"""The composition pipeline from the weights of a training run: for looking at it, and as a folder in diffusers' layout."""

import json
from pathlib import Path

import torch
from diffusers import PixArtSigmaPipeline

from fp4dit_ao.reference import compositions
from fp4dit_ao.reference.compositions.architecture import (
    build_model,
    build_tokenizer,
    pixel_autoencoder,
    scheduler,
)
from fp4dit_ao.reference.compositions.weight_files import read_weights


def assemble(run: Path) -> PixArtSigmaPipeline:
    """Pipeline of the averaged weights that training wrote to the folder ``run``, in float32."""
    record = json.loads((run / "training.json").read_text(encoding="utf-8"))
    tokenizer = build_tokenizer()
    model = build_model(len(tokenizer), record["width"], record["layers"]).eval()
    weights = read_weights(run)
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        raise ValueError(
            f"{run} holds other weights than this model has: {sorted(weights.keys() ^ parameters.keys())[:3]}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    return PixArtSigmaPipeline(tokenizer, model.text_encoder, pixel_autoencoder(), model.transformer, scheduler())


def load(model: Path | None) -> PixArtSigmaPipeline:
    """A pipeline's folder, what training wrote, or (None) the packed pipeline; in float32."""
    folder = model or compositions.path()
    if (folder / "model_index.json").exists():
        return PixArtSigmaPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    return assemble(folder)
