"""Process of one variant: ``python -m fp4dit_ao.benchmark.worker``, started by :mod:`fp4dit_ao.benchmark.turns`.

It reads one JSON object per line on standard input, and answers each with one on standard output: ``{"result": …}``, or
``{"error": "…"}`` after an exception. All other output goes to standard error.
"""

import importlib
import json
import os
import re
import statistics
import sys
import time
from typing import Any, TextIO

Facts = dict[str, Any]
"""Facts about a variant in one case, by name, which JSON can hold."""
Case = dict[str, Any]
"""Parameters of a case, by name: sizes, and the name of a pipeline."""
TURN_SECONDS = 0.02
"""Least duration of a turn; shorter calls are repeated."""


class Workload:
    """Base class of workloads: made once per worker, prepared for every case, then run as often as it is timed."""

    per_run: int = 1
    """Number of measured units per :meth:`run`."""

    def prepare(self, **case: Any) -> Facts:
        """Prepares for a case, first calls included; returns facts for the table, which JSON can hold."""
        raise NotImplementedError

    def run(self) -> None:
        """Runs the timed computation."""
        raise NotImplementedError

    def finish(self) -> Facts:
        """Returns facts that are known after the last turn."""
        return {}


def turn(workload: Workload) -> float:
    """Seconds per unit: the median over one turn. The first of several short runs is not counted, since caches are
    cold."""
    took = [timed(workload)]
    if took[0] < TURN_SECONDS:
        took = [timed(workload)]
        while sum(took) < TURN_SECONDS:
            took.append(timed(workload))
    return statistics.median(took) / workload.per_run


def timed(workload: Workload) -> float:
    """Seconds of one run, the GPU's work included."""
    began = time.perf_counter()
    workload.run()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def error_text(error: BaseException) -> str:
    """Type and first sentence of an error, in at most 240 characters."""
    text = " ".join(str(error).split())
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return f"{type(error).__name__}: {sentence}"[:240] if text else type(error).__name__


def serve(lines: TextIO, out: TextIO) -> None:
    """Answers every line of ``lines`` on ``out``."""
    workload: Workload | None = None
    for line in lines:
        message = json.loads(line)
        do = message.pop("do")
        try:
            if do == "open":
                module, _, name = message["workload"].partition(":")
                workload = getattr(importlib.import_module(module), name)(**message["options"])
                result: object = {}
            else:
                assert workload is not None, "'open' comes first"
                result = turn(workload) if do == "turn" else getattr(workload, do)(**message)
            answer = {"result": result}
        except Exception as error:
            answer = {"error": error_text(error)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def main() -> None:
    """Serves standard input; standard output is for answers only, also when libraries write to it from C."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
