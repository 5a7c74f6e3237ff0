"""How a part measures: calls captured in CUDA graphs and replayed in turns, and results that are written as they come."""

import contextlib
import fcntl
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from fp4dit_ao.util.atomic_files import write_text

Call = Callable[[], Any]
LOCK = Path(tempfile.gettempdir()) / f"fp4dit_ao-gpu-benchmark-{os.getuid()}.lock"
"""File by which several runs of this program take turns: see :func:`alone`."""
MOST_KERNELS = 16
"""Kernels of a step that are recorded."""


@dataclass
class Run:
    """One run of the program: where results go, and when the current part ends.

    Attributes:
        out: the JSON file.
        report: what it holds.
        until: ``time.monotonic()`` at which the part stops measuring.
        rounds: replays of every call.
        device: ``"cuda"``; tests take the CPU.
        only: part of the names of the cases to measure; all if empty.
    """

    out: Path
    report: dict[str, Any]
    until: float = float("inf")
    rounds: int = 11
    device: str = "cuda"
    only: str = ""
    skipped: list[str] = field(default_factory=list)
    lock: IO[str] | None = None

    def say(self, text: str) -> None:
        """Print at once, whoever reads."""
        print(text, flush=True)

    def record(self, part: str, row: Mapping[str, Any]) -> None:
        """Adds a row to the part's results and writes the file."""
        self.report.setdefault(part, []).append(dict(row))
        write_text(self.out, json.dumps(self.report, indent=1) + "\n")

    def has_time(self, what: str, seconds: float = 0.0) -> bool:
        """Whether ``seconds`` more fit into the part; otherwise notes that ``what`` was left out."""
        fits = time.monotonic() + seconds < self.until
        if not fits:
            self.skipped.append(what)
            self.say(f"{what}: no time left")
        return fits


def error_of(error: BaseException) -> str:
    """Type and first line of an error."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def timer(call: Call, device: str, calls: int = 1) -> tuple[Callable[[], float], Any]:
    """Function that runs ``call`` and returns the seconds it took; and a result of ``call``.

    On a GPU, ``calls`` calls are captured in one CUDA graph, so that launches from Python are not timed.
    """
    result = call()  # tunes and compiles
    if device == "cpu":

        def on_cpu() -> float:
            began = time.perf_counter()
            call()
            return time.perf_counter() - began

        return on_cpu, result
    call()  # some compile again in their second call
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replay() -> float:
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        return began.elapsed_time(ended) / 1e3 / calls

    replay.keeps = call  # type: ignore[attr-defined]  # a graph reads memory that the call's tensors own
    return replay, result


def in_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round, one after the other, so that a warming chip affects all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds + 1):
        for name, measure in timers.items():
            took = measure()
            if number:  # the first one warms up
                seconds[name].append(took)
    return seconds


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stops what runs in the main thread after that long, with ``TimeoutError``, so that a slow compiler costs one row."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ready after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def preparing() -> Iterator[IO[str]]:
    """Context in which no other run measures; yields the lock for :func:`alone`. Several runs may prepare at once, on the cores
    that compiling one model leaves idle."""
    with LOCK.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield file


@contextlib.contextmanager
def alone(lock: IO[str] | None) -> Iterator[None]:
    """Context in which no other run of this user prepares or measures; ``lock`` is what :func:`preparing` yielded."""
    if lock is None:
        yield
        return
    fcntl.flock(lock, fcntl.LOCK_UN)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_SH)


def kernels(call: Callable[[], object]) -> list[dict[str, Any]]:
    """Kernels that ``call`` runs on the GPU, those that take longest first: name, count, and microseconds in all."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    found = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": event.key[:120], "count": event.count, "us": event.self_device_time_total}
        for event in found[:MOST_KERNELS]
    ]


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, float]:
    """How many times as fast as ``base`` each one is: the median over the rounds of neighbours in time."""
    if base not in seconds:
        return {}
    return {
        name: statistics.median(b / own for b, own in zip(seconds[base], taken, strict=True))
        for name, taken in seconds.items()
    }


def quickest(seconds: Mapping[str, list[float]], among: Callable[[str], bool]) -> str | None:
    """The name with the least median, of those that are asked for."""
    names = [name for name in seconds if among(name)]
    return min(names, key=lambda name: statistics.median(seconds[name]), default=None)


def all_measured(calls: Mapping[str, Call], run: Run, repeat: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Times every call; what fails is listed with its error.

    Returns:
        ``{"seconds": ..., "failed": ...}``, and results by name.
    """
    timers: dict[str, Callable[[], float]] = {}
    failed: dict[str, str] = {}
    results: dict[str, Tensor] = {}
    for name, call in calls.items():
        try:
            timers[name], results[name] = timer(call, run.device, repeat)
        except Exception as error:
            failed[name] = error_of(error)
    with alone(run.lock):
        return {"seconds": in_turns(timers, run.rounds), "failed": failed}, results
