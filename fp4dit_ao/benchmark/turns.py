"""Processes that each hold one variant and take turns, and their results as ratios within a round.

A worker reads one JSON object per line on its standard input and answers each with one; see
:mod:`fp4dit_ao.benchmark.worker`.
"""

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeVar

from fp4dit_ao.benchmark.variants import Variant
from fp4dit_ao.benchmark.worker import Case, Facts

LIMIT_SECONDS = 1800.0
"""Time limit of one answer, after which a variant is given up."""


class WorkerFailed(Exception):
    """Raised when a variant cannot be measured; the message is for the report."""


class Worker:
    """A process that holds one variant of one workload.

    Args:
        workload: ``module:class`` of the workload; see :class:`fp4dit_ao.benchmark.worker.Workload`.
        options: keyword arguments of its class, which JSON can hold.
        environment: environment variables of the process, besides those of its parent.
        limit: time limit of one answer, in seconds.
    """

    def __init__(
        self,
        workload: str,
        options: Mapping[str, object],
        environment: dict[str, str] | None = None,
        limit: float = LIMIT_SECONDS,
    ):
        self._first = {"do": "open", "workload": workload, "options": options}
        self._environment = environment or {}
        self._limit = limit
        self._process: subprocess.Popen[str] | None = None
        self._log = tempfile.TemporaryFile(mode="w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self._answers: queue.Queue[str] = queue.Queue()
        self._opening = False

    def ask(self, do: str, **arguments: object) -> Any:
        """Calls a method of the workload and waits for its result; starts the process if there is none.

        Raises:
            WorkerFailed: the method raised an exception, or the process died or did not answer in time.
        """
        self.tell(do, **arguments)
        return self.answer()

    def tell(self, do: str, **arguments: object) -> None:
        """Calls a method of the workload without waiting; :meth:`answer` returns its result."""
        if self._process is None:
            self._start()
        self._send({"do": do} | arguments)

    def answer(self) -> Any:
        """Waits for the next result; raises like :meth:`ask`."""
        if self._opening:
            self._opening = False
            try:
                self.answer()
            except WorkerFailed:
                self.close()
                raise
        try:
            line = self._answers.get(timeout=self._limit)
        except queue.Empty:
            self.close()
            raise WorkerFailed(f"no answer within {self._limit:.0f} s") from None
        if not line:
            raise WorkerFailed(self._obituary())
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer["result"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # unwritten data has no reader any more
                        stream.close()
            self._process = None

    def __del__(self) -> None:
        self._log.close()  # not in close(): the log is read after the process has ended

    def _start(self) -> None:
        paths = [path or os.getcwd() for path in sys.path]  # the worker imports from the same places
        self._log.seek(0)
        self._log.truncate()
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fp4dit_ao.benchmark.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | self._environment,
        )  # fmt: skip
        threading.Thread(target=_listen, args=(self._process.stdout, self._answers), daemon=True).start()
        self._send(self._first)
        self._opening = True

    def _send(self, message: Mapping[str, object]) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # if the process died, answer() reports it
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _obituary(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        return f"{how}; last said: {lines[-1][:200]}" if lines else how


def _listen(stream: TextIO, answers: "queue.Queue[str]") -> None:
    try:
        for line in stream:
            answers.put(line)
    except ValueError:  # the stream was closed while reading
        pass
    answers.put("")


# --- rounds ----------------------------------------------------------------------------------------------------------


@dataclass
class Measured:
    """One variant in one case.

    Attributes:
        variant: the measured variant.
        case: parameters of the case, such as ``{"tokens": 256}``.
        facts: facts from the workload, such as its error against float32.
        seconds: seconds per call, one number per round.
        beside: seconds of every baseline in the same rounds, by label.
        error: message of a failure; None if there are seconds.
    """

    variant: Variant
    case: Case
    facts: Facts = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    beside: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None

    def ratio(self, base: str) -> "Ratio | None":
        """Speed relative to the baseline with that label: its seconds over ours, round by round; None if there is
        none."""
        others = self.beside.get(base, [])
        return Ratio.of(others, self.seconds) if others and len(others) == len(self.seconds) else None

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, object]:
        """All fields for JSON."""
        return vars(self) | {"variant": self.variant.label}


@dataclass(frozen=True)
class Ratio:
    """Median, lowest and highest of a ratio taken round by round."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        """Ratio of two series, which have one number per round each."""
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


Result = TypeVar("Result")
Progress = Callable[[str], None]
"""Takes a description of the current work."""


def measure(
    variants: Sequence[Variant],
    bases: Sequence[Variant],
    cases: Iterable[Case],
    start: Callable[[Variant], Worker],
    *,
    rounds: int,
    at_once: int,
    together: bool = False,
    progress: Progress = lambda text: None,
) -> Iterator[Measured]:
    """Times every variant in every case; each variant has one turn per round.

    Args:
        variants: variants to measure; baselines need not be repeated here.
        bases: baselines, which run in every round of every group, so that ratios are taken within a round.
        cases: arguments of the workload's ``prepare``.
        start: makes the worker of a variant.
        rounds: turns of each variant in each case.
        at_once: processes alive at once, baselines included; more variants are measured group by group.
        together: prepare the variants of a group at the same time, for workloads that measure nothing while preparing.
        progress: called with a description of the current work.

    Yields:
        One entry per variant and case, failures included, as soon as the case is done.
    """
    others = [variant for variant in variants if variant not in bases]
    size = max(1, at_once - len(bases))
    groups = [others[first : first + size] for first in range(0, len(others), size)] or [[]]
    cases = list(cases)
    workers: dict[Variant, Worker] = {}
    try:
        for number, group in enumerate(groups):
            members = [*bases, *group]
            workers |= {variant: start(variant) for variant in members if variant not in workers}
            for index, case in enumerate(cases):
                title = f"{number * len(cases) + index + 1} of {len(groups) * len(cases)}: {describe(case)}"
                of_case = _one_case({v: workers[v] for v in members}, bases, case, rounds, together, title, progress)
                yield from (m for m in of_case if number == 0 or m.variant not in bases)
            for variant in group:
                workers.pop(variant).close()
    finally:
        for worker in workers.values():
            worker.close()


def describe(case: Mapping[str, object]) -> str:
    """Text of a case: ``"layers 2, pixels 512"`` for ``{"layers": 2, "pixels": 512}``."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in case.items())


def _one_case(
    workers: Mapping[Variant, Worker], bases: Sequence[Variant], case: Case, rounds: int, together: bool,
    title: str, progress: Progress,
) -> list[Measured]:  # fmt: skip
    found = {variant: Measured(variant, case) for variant in workers}

    def attempt(variant: Variant, do: Callable[[], Result]) -> Result | None:
        if found[variant].error is None:
            try:
                return do()
            except WorkerFailed as error:
                found[variant] = Measured(variant, case, error=str(error))
        return None

    for variant, worker in workers.items():
        progress(f"{title}: prepare {variant.label}")
        do = worker.tell if together else worker.ask
        found[variant].facts |= attempt(variant, lambda do=do: do("prepare", **case)) or {}  # type: ignore[misc]
    if together:
        for variant, worker in workers.items():
            found[variant].facts |= attempt(variant, worker.answer) or {}
    for number in range(rounds):
        for variant, worker in workers.items():
            progress(f"{title}: round {number + 1} of {rounds}, {variant.label}")
            seconds = attempt(variant, lambda worker=worker: worker.ask("turn"))  # type: ignore[misc]
            if seconds is not None:
                found[variant].seconds.append(seconds)
    for variant, worker in workers.items():
        found[variant].facts |= attempt(variant, lambda worker=worker: worker.ask("finish")) or {}  # type: ignore[misc]
    beside = {base.label: found[base].seconds for base in bases if found[base].error is None}
    for measured in found.values():
        measured.beside = beside if measured.error is None else {}
    return list(found.values())
