"""The process of one variant: ``python -m fp4dit_ao.benchmark.worker``, started by :mod:`fp4dit_ao.benchmark.turns`.

One JSON object a line comes in on standard input, one goes out on standard output: ``{"result": …}``, or ``{"error": "…"}``
after an exception. Whatever else is printed here goes to standard error.
"""

import importlib
import json
import os
import re
import statistics
import sys
import time
from typing import Any, TextIO

TURN_SECONDS = 0.02
"""A turn of short calls repeats them for at least that long."""


class Workload:
    """What a worker measures. Made once; :meth:`prepare` for every case, then :meth:`run` as often as it is timed."""

    per_run: int = 1
    """How many of what is measured a :meth:`run` does."""

    def prepare(self, **case: Any) -> dict[str, Any]:
        """Make ready, first calls included; returns facts for the table."""
        raise NotImplementedError

    def run(self) -> None:
        """What is timed."""
        raise NotImplementedError

    def finish(self) -> dict[str, Any]:
        """Facts that are known after the last turn."""
        return {}


def turn(workload: Workload) -> float:
    """Seconds per call: the median over one turn. Of short runs the first is not counted: caches hold what others ran."""
    took = [timed(workload)]
    if took[0] < TURN_SECONDS:
        took = [timed(workload)]
        while sum(took) < TURN_SECONDS:
            took.append(timed(workload))
    return statistics.median(took) / workload.per_run


def timed(workload: Workload) -> float:
    """Seconds of one call, the GPU's work included."""
    began = time.perf_counter()
    workload.run()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def error_text(error: BaseException) -> str:
    """Type and first sentence, in at most 240 characters."""
    text = " ".join(str(error).split())
    sentence = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return f"{type(error).__name__}: {sentence}"[:240] if text else type(error).__name__


def serve(lines: TextIO, out: TextIO) -> None:
    """Answer every line until there are no more."""
    workload: Any = None
    for line in lines:
        message = json.loads(line)
        do = message.pop("do")
        try:
            if do == "open":
                module, _, name = message["workload"].partition(":")
                workload = getattr(importlib.import_module(module), name)(**message["options"])
                result: Any = {}
            else:
                result = turn(workload) if do == "turn" else getattr(workload, do)(**message)
            answer = {"result": result}
        except Exception as error:
            answer = {"error": error_text(error)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def main() -> None:
    """Keep standard output for answers alone, also from what libraries write past Python."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
