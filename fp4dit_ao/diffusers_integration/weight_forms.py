"""Choice of the form in which each weight is the fastest on a machine: packed, a byte a level (on GPUs), or bfloat16."""

from collections.abc import Callable, Mapping

import torch

from fp4dit_ao.diffusers_integration.graph_form import QuantizedTransformer
from fp4dit_ao.evaluation.layer_speed import better_in_bfloat16, kind_of, layer_speeds
from fp4dit_ao.evaluation.layer_timing import LayerSpeed
from fp4dit_ao.evaluation.weight_choice import Form, fastest_forms
from fp4dit_ao.graph_capture.layer_rows import LayerRows, layer_rows
from fp4dit_ao.passes.weight_unpacking import BFLOAT16, unpack_weights
from fp4dit_ao.tensors.codebook import CodebookTensor
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from fp4dit_ao.tensors.minifloat import MinifloatTensor

PACKED = "packed"
RESIDENT = ("fp8", "int8")
"""Types of bytes, in the order in which they are tried; the first that holds a weight and that the device multiplies is timed.
"""
SHARE_FOR_WEIGHTS = 0.25
"""Part of a GPU's free memory, beyond the packed transformer, that faster forms of its weights may take. The rest is for text
encoders, the decoder and activations, which are not there yet."""


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


def keep_fastest(transformer: QuantizedTransformer, device: torch.device, memory: int | None = None) -> dict[str, str]:
    """Turns weights, in place, to the form that is the fastest on ``device``; returns the new forms by the names of linears.

    A transformer that does not run in bfloat16 stays as it is: bfloat16 would be less exact.

    Args:
        transformer: on any device.
        device: where it will run.
        memory: bytes that its weights may take more than packed. If None, a part of what is free on a GPU; on CPUs any
            number, and a byte a level is no form there, since the kernel for packed codes is the faster one.
    """
    if transformer.dtype != torch.bfloat16:
        return {}
    if memory is None and device.type == "cuda":
        memory = free_for_weights(torch.cuda.mem_get_info(device)[0], transformer.nbytes())
    speeds, rows = measured(transformer, device)
    if memory is None:
        chosen = dict.fromkeys(better_in_bfloat16(speeds, transformer.dtype), BFLOAT16)
    else:
        weights = low_bit_weights(transformer)
        chosen = fastest_forms(forms(weights, speeds, _resident(weights, rows, device)), memory)
    for form in dict.fromkeys(chosen.values()):
        unpack_weights(transformer, form, [name for name, own in chosen.items() if own == form])
    return chosen


def free_for_weights(free: int, packed: int) -> int:
    """Bytes that faster forms of a transformer's weights may take, of ``free`` ones, once ``packed`` have been moved there."""
    return int(max(0, free - packed) * SHARE_FOR_WEIGHTS)


def forms(
    weights: Mapping[str, LowBitWeight],
    speeds: Mapping[str, LayerSpeed],
    resident: Mapping[str, tuple[str, LayerSpeed]],
) -> dict[str, list[Form]]:
    """Forms of each linear's weight, the packed one first.

    Times of another form are taken relative to bfloat16, beside which each was measured. What a busy machine measured decides
    nothing.

    Args:
        weights: packed, by the name of their linear.
        speeds: of these.
        resident: type of the bytes, and the speed with them, where there is such a form.
    """
    found: dict[str, list[Form]] = {}
    for name, packed in speeds.items():
        if not packed.steady:
            continue
        rows, columns = weights[name].shape
        seconds = packed.bfloat16
        found[name] = [Form(PACKED, seconds / packed.speed, rows * columns // 2)]
        if name in resident and resident[name][1].steady:
            to, speed = resident[name]
            found[name].append(Form(to, seconds / speed.speed, rows * columns))
        found[name].append(Form(BFLOAT16, seconds, 2 * rows * columns))
    return found


def _resident(
    weights: Mapping[str, LowBitWeight], rows: LayerRows, device: torch.device
) -> dict[str, tuple[str, LayerSpeed]]:
    """Type and speed of the resident form of every linear that has one: measured once for each kind, like packed ones, since a
    model's worth of bytes may not fit beside the model."""
    sharing: dict[str, list[str]] = {}
    for name in weights:
        if name in rows.rows:
            sharing.setdefault(rows.inputs.get(name, name), []).append(name)
    first: dict[tuple[str, ...], list[str]] = {}
    kinds = {name: kind_of(weights[name], rows.rows[name], device) for names in sharing.values() for name in names}
    for names in sharing.values():
        first.setdefault(tuple(sorted(kinds[name] for name in names)), names)
    bytes_of: dict[str, LowBitWeight] = {}
    types: dict[str, str] = {}
    for name in [name for names in first.values() for name in names]:
        held = resident_form(weights[name], device)
        if held is not None:
            types[name], bytes_of[name] = held
    speeds = layer_speeds(bytes_of, rows.rows, device, inputs=rows.inputs)
    known: dict[tuple[tuple[str, ...], str], tuple[str, LayerSpeed]] = {}
    for signature, names in first.items():
        known |= {(signature, kinds[name]): (types[name], speeds[name]) for name in names if name in speeds}
    found: dict[str, tuple[str, LayerSpeed]] = {}
    for names in sharing.values():
        signature = tuple(sorted(kinds[name] for name in names))
        found |= {name: known[signature, kinds[name]] for name in names if (signature, kinds[name]) in known}
    return found


def resident_form(weight: LowBitWeight, device: torch.device) -> tuple[str, LevelTensor] | None:
    """A packed weight as bytes that ``device`` multiplies as they are, and their type; None if there are none."""
    if not isinstance(weight, MinifloatTensor | CodebookTensor) or weight.act_fmt is None:
        return None
    for to in RESIDENT:
        try:
            held = LevelTensor.from_packed(weight, to)
        except ValueError:  # this type does not hold its levels, or those of its input
            continue
        if held.unit(device).low_bit:
            return to, held
    return None
