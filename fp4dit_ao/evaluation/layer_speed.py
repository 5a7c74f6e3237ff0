"""How fast each linear of a quantized model is here against bfloat16: measured once for each kind of linear, and kept."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fp4dit_ao import __version__, _compat
from fp4dit_ao.evaluation.environment import environment
from fp4dit_ao.evaluation.layer_timing import LayerSpeed, measure
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from fp4dit_ao.util.user_cache import cache_folder, read_json, write_json

BUDGET_SECONDS = 6.0
"""Seconds of measuring for a whole model, shared by its kinds of linears; what is slow may take longer."""

_NUMBERS = 3
"""Leading fields of a speed that are kept."""

Measurer = Callable[[Sequence[LowBitWeight], int, torch.device, float], LayerSpeed]
"""Signature of :func:`fp4dit_ao.evaluation.layer_timing.measure`."""


def layer_speeds(
    weights: Mapping[str, LowBitWeight],
    rows: Mapping[str, int],
    device: torch.device,
    *,
    again: bool = False,
    measurer: Measurer = measure,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, LayerSpeed]:
    """The speed of every linear against bfloat16 on ``device``; results are read from, and added to, the user's cache.

    Those of a busy machine are not kept, and a warning says so.

    Args:
        weights: low-bit weights by the name of their linear.
        rows: tokens of a call, by the same names; linears without are left out.
        device: where the linears run.
        again: measure what was measured before.
        measurer: times one kind of linear.
        progress: called with a description of the current work.
    """
    machine = this_machine(device)
    path = cache_folder() / f"layer-speed-{_digest(machine)}.json"
    known = {} if again else _known(path, machine)
    kinds: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if name in rows:
            kinds.setdefault(kind_of(weight, rows[name], device), []).append(name)
    missing = [kind for kind in kinds if kind not in known]
    for number, kind in enumerate(missing):
        names = kinds[kind]
        features, depth = weights[names[0]].shape
        progress(f"measuring {number + 1} of {len(missing)}: {features} x {depth}, {rows[names[0]]} tokens")
        found = measurer([weights[n] for n in names], rows[names[0]], device, BUDGET_SECONDS / len(missing))
        known[kind] = found
    if steady := {kind: known[kind] for kind in missing if known[kind].steady}:
        measured = {kind: list(speed[:_NUMBERS]) for kind, speed in (_known(path, machine) | steady).items()}
        write_json(path, {"machine": machine, "measured": measured})
    if len(steady) < len(missing):
        warnings.warn(
            f"other work disturbs the measuring of {len(missing) - len(steady)} of {len(missing)} kinds of linears, whose "
            "speeds are not kept; repeat it when the machine is idle",
            stacklevel=2,
        )
    return {name: known[kind] for kind, names in kinds.items() for name in names}


def better_in_bfloat16(speeds: Mapping[str, LayerSpeed], dtype: torch.dtype) -> list[str]:
    """The rule of ``weights="auto"``: names of linears whose weights are held in bfloat16, since that is faster.

    bfloat16 is exact enough only in a model that runs in it. What a busy machine measured decides nothing.

    Args:
        speeds: of every quantized linear, by name.
        dtype: type in which everything else runs.
    """
    slower = [name for name, found in speeds.items() if found.steady and found.speed < 1]
    return slower if dtype == torch.bfloat16 else []


def kind_of(weight: LowBitWeight, rows: int, device: torch.device) -> str:
    """Key of a linear's speed on one machine: how its weight is stored, which unit computes it, and tokens of a call."""
    parts = {name: getattr(weight, name) for name in _compat.parts(type(weight))}
    shown = ", ".join(f"{k} {tuple(v.shape) if isinstance(v, Tensor) else v}" for k, v in parts.items() if k != "dtype")
    return f"{type(weight).__name__} ({shown}), {weight.unit(device)}, {rows} tokens"


def this_machine(device: torch.device) -> dict[str, str]:
    """Environment that results hold for: hardware, threads, versions."""
    found = environment()
    place = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    kept = ("processor", "instructions", "kernel", "threads", "torch", "torchao")
    library = "none" if native.shared_object() is None else str(native.VERSION)
    return {key: found[key] for key in kept} | place | {"fp4dit-ao": __version__, "library": library}


def _known(path: Path, machine: Mapping[str, str]) -> dict[str, LayerSpeed]:
    """Results in a cache's file; none if it is damaged or another machine's."""
    stored = read_json(path)
    measured = stored.get("measured")
    if stored.get("machine") != machine or not isinstance(measured, dict):
        return {}
    return {kind: LayerSpeed(*numbers) for kind, numbers in measured.items() if _is_speed(numbers)}


def _is_speed(numbers: object) -> bool:
    if not isinstance(numbers, list) or len(numbers) != _NUMBERS:
        return False
    return all(isinstance(n, float) and 0 < n < float("inf") for n in numbers)


def _digest(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
