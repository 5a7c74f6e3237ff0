"""Workloads that behave well or badly, for ``test_benchmark.py``; run in processes that import no torch."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from fp4dit_ao.benchmark.worker import Workload


class Sleeper(Workload):
    """Sleeps; appends its name to a diary for every turn."""

    def __init__(self, name: str, diary: str = "", seconds: float = 0.021):
        self.name, self.diary, self.seconds = name, diary, seconds

    def prepare(self, **case: Any) -> dict[str, Any]:
        print("chatter that is no answer")
        os.write(1, b"chatter from a library\n")
        return {"pid": os.getpid(), "case": case}

    def run(self) -> None:
        if self.diary:
            with Path(self.diary).open("a") as file:
                file.write(self.name + "\n")
        time.sleep(self.seconds)

    def finish(self) -> dict[str, Any]:
        return {"finished": True}


class CannotBeMade(Sleeper):
    def __init__(self, name: str, **options: Any):
        raise NotImplementedError("needs a GPU of\nthe future. And other things")


class FailsOnce(Sleeper):
    """Only in the case ``{"size": 1}``."""

    def prepare(self, **case: Any) -> dict[str, Any]:
        if case.get("size") == 1:
            raise ValueError(f"{self.name} takes no size 1")
        return super().prepare(**case)


class Crashes(Sleeper):
    """By a signal, in its second turn."""

    turns = 0

    def run(self) -> None:
        self.turns += 1
        if self.turns == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        super().run()


class Exits(Sleeper):
    def prepare(self, **case: Any) -> dict[str, Any]:
        os.write(2, b"out of patience\n")
        os._exit(3)


class Hangs(Sleeper):
    def run(self) -> None:
        time.sleep(60)
