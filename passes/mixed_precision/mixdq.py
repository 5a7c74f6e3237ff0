"""MixDQ (arXiv 2405.17873): sensitivities of two kinds of layers by two metrics, an integer programme for each, one budget."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fp4dit_ao.passes.mixed_precision.allocation import ALLOCATIONS, LayerChoices, check_budget
from fp4dit_ao.passes.mixed_precision.integer_programme import integer_programme

CONTENT = re.compile(r"(?:^|\.)(?:ff|mlp|feed_?forward|attn2|cross_?attn|add_[qkv]_proj|to_add_out)")
"""Pattern in names of the layers that decide an image's content: feed-forwards, and attention to or of the text."""
QUALITY_LAYERS, CONTENT_LAYERS = "quality", "content"
"""Names of the two groups."""
RATIOS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.5)
"""Mean bits of content layers over those of quality layers that are tried."""


@dataclass(frozen=True)
class MixDQ:
    """Shares bits out within two groups of layers, whose errors cannot be compared, and tries how to share them out between.

    Each layer is quantized alone, in each format, the others in full precision, and the model's output is compared with the
    float model's: by the relative squared error (one over the signal-to-noise ratio) for layers that decide quality, by one
    minus structural similarity for those that decide content, the feed-forwards and the attention to the text. With N_q and
    N_c weights in the groups, rho = N_c / N_q, and a budget of B bits, quality layers get ``B (1 + rho) / (k rho + 1)`` and
    content layers k times that, for several k. An integer programme solves each, and of these allocations that is taken with
    which the model's output is nearest to the float model's.

    In the paper outputs are images after one step. Here they are the model's predictions on calibration samples, which cost a
    call of the model each and not a generation. Errors are added up as they are; the paper adds up decibels, in which a layer
    that hardly matters counts as much as another. It shares out bits of inputs likewise; here inputs have one format.

    Attributes:
        samples: calibration samples to compare outputs on, spread over all.
    """

    samples: int = 4

    def group(self, name: str) -> str:
        """Group of a layer, by its fully qualified name."""
        return CONTENT_LAYERS if CONTENT.search(name) else QUALITY_LAYERS

    def __call__(self, layers: Sequence[LayerChoices], budget_bits: float | None) -> dict[str, str]:
        """With the same mean bits in both groups, as far as each can spend them.

        Raises:
            ValueError: the budget is below what the smallest choices take.
        """
        return self.candidates(layers, budget_bits)[0]

    def candidates(self, layers: Sequence[LayerChoices], budget_bits: float | None) -> list[dict[str, str]]:
        """Allocations within the budget, all different, the one with equal bits in both groups first, if there is one.

        Raises:
            ValueError: the budget is below what the smallest choices take.
        """
        check_budget(layers, budget_bits)
        groups = [[x for x in layers if self.group(x.name) == kind] for kind in (QUALITY_LAYERS, CONTENT_LAYERS)]
        if budget_bits is None or not all(groups):
            return [integer_programme(layers, budget_bits)]
        found: list[dict[str, str]] = []
        for ratio in sorted(RATIOS, key=lambda k: abs(k - 1)):
            allocation = _shared_out(groups[0], groups[1], budget_bits, ratio)
            if allocation is not None and allocation not in found:
                found.append(allocation)
        return found or [integer_programme(layers, budget_bits)]


def _shared_out(
    quality: Sequence[LayerChoices], content: Sequence[LayerChoices], budget: float, ratio: float
) -> dict[str, str] | None:
    """Both integer programmes; None where a group's smallest formats take more than its share."""
    rho = _weights(content) / _weights(quality)
    share = budget * (1 + rho) / (ratio * rho + 1)
    try:
        return integer_programme(quality, share) | integer_programme(content, ratio * share)
    except ValueError:
        return None


def _weights(layers: Sequence[LayerChoices]) -> int:
    return sum(layer.weights for layer in layers)


ALLOCATIONS.register(
    "mixdq", MixDQ(), summary="Errors of the model's output by two metrics, for quality and for content layers.",
    source="MixDQ, arXiv 2405.17873", cost="4 calls of the model for each layer and candidate, and for each of 8 shares",
)  # fmt: skip
