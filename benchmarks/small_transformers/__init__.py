"""Small models of every transformer of diffusers that denoises, with random weights, and calls of their ``forward``."""

import math
import re
from typing import Any

import torch
from torch import nn

from benchmarks.small_transformers.audio import AUDIO
from benchmarks.small_transformers.entry import Small
from benchmarks.small_transformers.image import IMAGE
from benchmarks.small_transformers.known import KNOWN
from benchmarks.small_transformers.video import VIDEO
from fp4dit_ao.families import example_inputs
from fp4dit_ao.families.sample_inputs import Random

SMALL_TRANSFORMERS: dict[str, Small] = dict(
    sorted(({kind: Small(config, None) for kind, config in reversed(KNOWN.values())} | IMAGE | VIDEO | AUDIO).items())
)
"""Small models by the name of their class, in alphabetical order; of families with several models, the first."""

NO_DENOISERS = {
    "HunyuanDiT2DControlNetModel": "a ControlNet, which adds to a denoiser",
    "HunyuanDiT2DMultiControlNetModel": "a list of ControlNets",
    "LongCatAudioDiTVae": "an autoencoder",
}
"""Classes with a transformer's name that do not denoise, and what they are."""


def transformer_classes() -> list[str]:
    """Names of all classes of the installed diffusers that are called transformers and denoise, sorted."""
    import diffusers

    named = re.compile(r"^(?!.*(Pipeline|Blocks)).*(Transformer|DiT)")
    return sorted(name for name in dir(diffusers) if named.match(name) and name not in NO_DENOISERS)


def untried_classes() -> list[str]:
    """Names of the installed diffusers' transformers that have no small model here: those of a later version."""
    return [name for name in transformer_classes() if name not in SMALL_TRANSFORMERS]


def randomize(model: nn.Module) -> nn.Module:
    """Gives linears random weights, in place, so that outputs have the magnitude of inputs, and no branch adds nothing."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=1 / math.sqrt(module.in_features))
        elif type(module).__name__.endswith("Experts"):  # allocated only; (experts, in, out)
            for weights in module.parameters(recurse=False):
                nn.init.normal_(weights, std=1 / math.sqrt(weights.shape[1]))
    return model.eval().requires_grad_(False)


def small_transformer(kind: str, seed: int = 0) -> nn.Module:
    """Small model of a class in :data:`SMALL_TRANSFORMERS`."""
    import diffusers

    torch.manual_seed(seed)
    return randomize(getattr(diffusers, kind)(**SMALL_TRANSFORMERS[kind].config))


def small_inputs(kind: str, model: nn.Module, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of one ``forward`` of :func:`small_transformer`."""
    inputs = SMALL_TRANSFORMERS[kind].inputs
    torch.manual_seed(seed)
    return example_inputs(model, seed=seed) if inputs is None else inputs(Random(seed, torch.float32))
