"""How fast each linear of a quantized model is here against bfloat16: measured once for each kind of linear, and kept.

Linears that share their input are measured together, since a compiled graph quantizes it once for all of them.
"""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fp4dit_ao import __version__, _compat
from fp4dit_ao.evaluation.environment import environment
from fp4dit_ao.evaluation.layer_timing import MOST_BYTES, LayerSpeed, Together, measure
from fp4dit_ao.kernels.cpu import native
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight
from fp4dit_ao.util.user_cache import cache_folder, read_json, write_json

BUDGET_SECONDS = 6.0
"""Seconds of measuring for a whole model, shared by its kinds of linears; what is slow may take longer."""

MOST_TOGETHER = 8
"""Most linears that are measured together. All blocks read one text: eight of them are enough for its quantization to cost
little."""

_NUMBERS = 3
"""Leading fields of a speed that are kept."""

Measurer = Callable[[Sequence[Together], int, torch.device, float], LayerSpeed]
"""Signature of :func:`fp4dit_ao.evaluation.layer_timing.measure`."""


def layer_speeds(
    weights: Mapping[str, LowBitWeight],
    rows: Mapping[str, int],
    device: torch.device,
    *,
    inputs: Mapping[str, str] | None = None,
    again: bool = False,
    measurer: Measurer = measure,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, LayerSpeed]:
    """The speed of every linear against bfloat16 on ``device``; results are read from, and added to, the user's cache.

    Linears that share their input are measured together: each has its share of the seconds, by its size, and the speed of all.
    Those of a busy machine are not kept, and a warning says so.

    Args:
        weights: low-bit weights by the name of their linear.
        rows: tokens of a call, by the same names; linears without are left out.
        inputs: the value that a linear reads, by the same names; a linear without has its own.
        device: where the linears run.
        again: measure what was measured before.
        measurer: times one kind of linear.
        progress: called with a description of the current work.
    """
    machine = this_machine(device)
    path = cache_folder() / f"layer-speed-{_digest(machine)}.json"
    known = {} if again else _known(path, machine)
    kinds: dict[str, list[list[str]]] = {}
    for names in _sharing({name: x for name, x in weights.items() if name in rows}, inputs or {}):
        own = {name: kind_of(weights[name], rows[name], device) for name in names}
        names.sort(key=own.__getitem__)
        kinds.setdefault(" + ".join(own[name] for name in names), []).append(names)
    missing = [kind for kind in kinds if kind not in known]
    for number, kind in enumerate(missing):
        groups = [[weights[name] for name in names] for names in kinds[kind]]
        count = rows[kinds[kind][0][0]]
        sizes = " and ".join(f"{features} x {depth}" for features, depth in (weight.shape for weight in groups[0]))
        progress(f"measuring {number + 1} of {len(missing)}: {sizes}, {count} tokens")
        known[kind] = measurer(groups, count, device, BUDGET_SECONDS / len(missing))
    if steady := {kind: known[kind] for kind in missing if known[kind].steady}:
        measured = {kind: list(speed[:_NUMBERS]) for kind, speed in (_known(path, machine) | steady).items()}
        write_json(path, {"machine": machine, "measured": measured})
    if len(steady) < len(missing):
        warnings.warn(
            f"other work disturbs the measuring of {len(missing) - len(steady)} of {len(missing)} kinds of linears, whose "
            "speeds are not kept; repeat it when the machine is idle",
            stacklevel=2,
        )
    speeds = {
        name: share
        for kind, groups_of_names in kinds.items()
        for names in groups_of_names
        for name, share in _shares(known[kind], {name: weights[name] for name in names}).items()
    }
    return {name: speeds[name] for name in weights if name in speeds}


def _sharing(weights: Mapping[str, LowBitWeight], inputs: Mapping[str, str]) -> Iterator[list[str]]:
    """Names of linears that are measured together: they read one value in one format."""
    found: dict[tuple[str | None, str], list[str]] = {}
    for name, weight in weights.items():
        found.setdefault((getattr(weight, "act_fmt", None), inputs.get(name, f"{name}'s own")), []).append(name)
    for names in found.values():
        size = max(2 * weights[name].numel() for name in names)
        count = max(1, min(MOST_TOGETHER, MOST_BYTES // size))
        yield from (names[start : start + count] for start in range(0, len(names), count))


def _shares(speed: LayerSpeed, weights: Mapping[str, LowBitWeight]) -> dict[str, LayerSpeed]:
    """What each linear has of the seconds of all."""
    whole = sum(weight.numel() for weight in weights.values())
    parts = {name: weight.numel() / whole for name, weight in weights.items()}
    return {
        name: LayerSpeed(speed.seconds * part, speed.bfloat16 * part, speed.speed, speed.steady)
        for name, part in parts.items()
    }


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
    library = "none" if not native.is_built() else str(native.VERSION)
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
