"""Choice of the form in which each weight is the fastest on a machine: packed, or bfloat16."""

from collections.abc import Callable

import torch

from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.evaluation.layer_speed import better_in_bfloat16, layer_speeds
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.graph_capture.layer_rows import LayerRows, layer_rows
from fp4dit_ao.passes.weight_unpacking import unpack_weights
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight


def low_bit_weights(transformer: QuantizedTransformer) -> dict[str, LowBitWeight]:
    """The quantized weight of every linear, by the linear's name."""
    found: dict[str, LowBitWeight] = {}
    for name, parameter in transformer.graph.named_parameters():
        weight = parameter.detach()
        if isinstance(weight, LowBitWeight):
            found[name.removesuffix(".weight")] = weight
    return found


def measured(
    transformer: QuantizedTransformer,
    device: torch.device,
    tokens: int | None = None,
    *,
    again: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> tuple[dict[str, LayerSpeed], LayerRows]:
    """The speed of every quantized linear against bfloat16 on ``device``, and the rows that it was measured at.

    Args:
        transformer: on any device.
        device: where its layers would run.
        tokens: image tokens of a call; those of the captured sample if None. See :func:`layer_rows`.
        again: measure what the user's cache knows.
        progress: called with a description of the current work.
    """
    rows = layer_rows(transformer.graph, transformer.description, tokens)
    weights = low_bit_weights(transformer)
    return layer_speeds(weights, rows.rows, device, inputs=rows.inputs, again=again, progress=progress), rows


def keep_fastest(transformer: QuantizedTransformer, device: torch.device) -> list[str]:
    """Turns weights to bfloat16, in place, where that is faster on ``device``; returns the names of these linears.

    A transformer that does not run in bfloat16 stays as it is: bfloat16 would be less exact.
    """
    if transformer.dtype != torch.bfloat16:
        return []
    speeds, _ = measured(transformer, device)
    slow = better_in_bfloat16(speeds, transformer.dtype)
    unpack_weights(transformer, "bfloat16", slow)
    return slow
