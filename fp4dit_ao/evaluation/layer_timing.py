"""Times linears with low-bit weights against bfloat16, in turns, so that load on the machine affects both alike.

Ours are the operators that a compiled graph calls, with the quantization of tokens in the time: once for all linears that
share their input, such as q, k and v. bfloat16 is ``F.linear``, on CPUs also oneDNN with the weight laid out beforehand, as in
Inductor's frozen graphs. A CPU without instructions for bfloat16 emulates it, many times slower than float32, which stands in
for it there. In every round the quicker one counts.
"""

import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from functorch.compile import aot_function  # type: ignore[import-untyped]
from torch import Tensor
from torch.fx import GraphModule

from fp4dit_ao import _compat
from fp4dit_ao.kernels import token_quantization
from fp4dit_ao.tensors.low_bit_weight import LowBitWeight

MOST_WEIGHTS, MOST_BYTES = 64, 1 << 28
"""Most weights that are called one after the other, as in a model, where none of them waits in a cache; and most bytes of
them in bfloat16."""
Together = Sequence[LowBitWeight]
"""Weights of linears that share their input; one alone, where a linear has its own."""
LONG_CALL = 0.02
"""Seconds of a call from which on one weight is enough: it does not stay in a cache either way."""
TURN_SECONDS = 0.0005
"""Least duration of a turn; shorter calls are repeated. Short turns are seldom interrupted by other work."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 101
STEADY = 2.0
OURS, WARM_UP = "ours", 2

Way = Callable[[], object]


class LayerSpeed(NamedTuple):
    """One linear, or some that share their input, against bfloat16.

    Attributes:
        seconds: of ours, the median over the rounds.
        bfloat16: of bfloat16 likewise.
        speed: how many times as fast as bfloat16 ours is, the median of the rounds' ratios.
        steady: whether neither median is above :data:`STEADY` times the least time; else the machine was busy.
    """

    seconds: float
    bfloat16: float
    speed: float
    steady: bool = True


@torch.no_grad()
def measure(groups: Sequence[Together], rows: int, device: torch.device, seconds: float) -> LayerSpeed:
    """Times linears that share their input, ``rows`` bfloat16 tokens, for about so many seconds.

    Args:
        groups: of equal sizes and formats; as many are called as :data:`MOST_WEIGHTS` and :data:`MOST_BYTES` allow.
        rows: tokens of a call.
        device: where they run.
        seconds: of measuring, after the warm-up; :data:`LEAST_ROUNDS` rounds are taken in any case.

    Returns:
        the speed of one group.
    """
    depth = groups[0][0].shape[1]
    size = sum(weight.shape[0] for weight in groups[0]) * depth
    groups = groups[: max(1, min(MOST_WEIGHTS // len(groups[0]), MOST_BYTES // (2 * size)))]
    x = torch.randn(rows, depth, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    first = _ways(x, groups[:1], device)
    took = [_warmed(way, device) for way in first.values()]
    every = first if max(took) > LONG_CALL or len(groups) == 1 else _ways(x, groups, device)
    count = 1 if every is first else len(groups)
    timers = {name: _timer(way, device, count) for name, way in every.items()}
    return summary(in_turns(timers, seconds))


def in_turns(
    timers: Mapping[str, Callable[[], float]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, float]]:
    """Rounds in which every timer has its turn, for so many seconds, but :data:`LEAST_ROUNDS` to :data:`MOST_ROUNDS`.

    Rounds before them warm up and do not count.
    """
    for _ in range(WARM_UP):
        for timer in timers.values():
            timer()
    began, rounds = clock(), list[dict[str, float]]()
    while len(rounds) < LEAST_ROUNDS or (len(rounds) < MOST_ROUNDS and clock() - began < seconds):
        rounds.append({name: timer() for name, timer in timers.items()})
    return rounds


def summary(rounds: Sequence[Mapping[str, float]]) -> LayerSpeed:
    """Medians over the rounds; the quickest way of bfloat16 counts in each."""
    others = [min(took for name, took in turn.items() if name != OURS) for turn in rounds]
    ours = [turn[OURS] for turn in rounds]
    speed = statistics.median(other / own for other, own in zip(others, ours, strict=True))
    steady = all(statistics.median(took) <= STEADY * min(took) for took in (ours, others))
    return LayerSpeed(statistics.median(ours), statistics.median(others), speed, steady)


def _ways(x: Tensor, groups: Sequence[Together], device: torch.device) -> dict[str, Way]:
    """Functions that call all of ``groups`` with ``x``, by name."""
    held = [[weight.to(device) for weight in group] for group in groups]
    floats = [weight.dequantize(torch.bfloat16).contiguous() for group in held for weight in group]
    if device.type == "cuda":  # where quantizing tokens is many small operators, unless it is compiled
        compiled = torch.compile(_linears)
        ours: list[Way] = [functools.partial(compiled, x, *group) for group in held]
    else:
        ours = operators(x, held)
    ways: dict[str, list[Way]] = {OURS: ours, "bfloat16": [functools.partial(F.linear, x, w) for w in floats]}
    if device.type == "cpu":
        if prepacked := _prepacked(x, floats):
            ways["bfloat16, prepacked"] = prepacked
        else:
            ways["float32"] = [functools.partial(F.linear, x.float(), w.float()) for w in floats]
    return {name: functools.partial(_all, calls) for name, calls in ways.items()}


def _linears(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [F.linear(x, weight) for weight in weights]


def operators(x: Tensor, groups: Sequence[Together]) -> list[Way]:
    """Linears that share their input, as the operators that a compiled graph of them calls, on plain tensors: neither a tensor
    subclass is dispatched nor a unit picked, and tokens are quantized once.

    Args:
        x: tokens.
        groups: of equal sizes, formats and units, so that the graph of the first one serves all.
    """
    traced: list[tuple[GraphModule, Sequence[Tensor]]] = []

    def compiler(graph: GraphModule, _: object) -> Callable[..., object]:
        def run(*inputs: Tensor) -> object:
            traced.append((graph, inputs))
            return graph.forward(*inputs)

        return run

    with token_quantization.always_in_loop():
        aot_function(_linears, fw_compiler=compiler)(x, *groups[0])
    ((graph, inputs),) = traced
    places: dict[tuple[int, tuple[int, ...]], list[tuple[int, str]]] = {}
    for index, weight in enumerate(groups[0]):
        for name in _compat.parts(type(weight)):
            if isinstance(part := getattr(weight, name), Tensor):
                places.setdefault(_memory(part), []).append((index, name))
    order = [places[_memory(tensor)].pop(0) if _memory(tensor) in places else None for tensor in inputs]
    return [
        functools.partial(
            graph.forward, *(x if place is None else getattr(group[place[0]], place[1]) for place in order)
        )
        for group in groups
    ]


def _memory(x: Tensor) -> tuple[int, tuple[int, ...]]:
    return x.data_ptr(), tuple(x.shape)


def _prepacked(x: Tensor, weights: Sequence[Tensor]) -> list[Way]:
    """Calls on oneDNN; none where that has no bfloat16."""
    if not torch.backends.mkldnn.is_available():
        return []
    try:
        calls: list[Way] = [_compat.prepacked_linear(x, weight, None) for weight in weights]
        calls[0]()
    except RuntimeError:  # an old processor
        return []
    return calls


def _all(calls: Sequence[Way]) -> None:
    for call in calls:
        call()


def _warmed(way: Way, device: torch.device) -> float:
    """Least seconds of a call after the first one, which makes what later ones keep."""
    took = []
    for _ in range(4):
        began = time.perf_counter()
        way()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        took.append(time.perf_counter() - began)
        if took[-1] > LONG_CALL and len(took) > 1:
            break
    return min(took[1:])


def _timer(way: Way, device: torch.device, count: int) -> Callable[[], float]:
    """Function that runs ``way`` for a turn and returns the seconds of one of the ``count`` groups in it."""
    repeats = max(1, round(TURN_SECONDS / max(1e-7, _warmed(way, device))))
    if device.type == "cuda":
        return _on_gpu(way, repeats * count, repeats)

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            way()
        return (time.perf_counter() - began) / (repeats * count)

    return turn


def _on_gpu(way: Way, groups: int, repeats: int) -> Callable[[], float]:
    """Captures ``way`` as a CUDA graph, so that launches from Python, which a compiled model lacks, are not timed."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            way()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def turn() -> float:
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / groups

    turn.keeps = way  # type: ignore[attr-defined]  # a graph reads memory that the calls' tensors own
    return turn
