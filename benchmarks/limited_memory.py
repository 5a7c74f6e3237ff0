"""Commands in little memory: a limit that the kernel keeps, and the memory that a process takes from moment to moment.

The pages of a file that is mapped into memory can be read again and so take no room that anybody else needs; what counts is
anonymous memory (``RssAnon`` in ``/proc/self/status``), which without swap stays until it is freed.
"""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from fp4dit_ao.util.mapped_files import anonymous_bytes

_CGROUP = Path("/sys/fs/cgroup/memory")
"""Mount point of version 1 of control groups."""
_INTERVAL = 0.001
"""Seconds between two looks at a process's memory."""


class Peak:
    """The most anonymous memory that this process takes inside ``with Peak() as peak``.

    Attributes:
        before: bytes at the beginning.
        bytes: the most, looked at once a millisecond.
    """

    def __enter__(self) -> "Peak":
        self.before = self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self.bytes = max(self.bytes, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous_bytes())

    @property
    def added(self) -> int:
        """Bytes of the peak above those at the beginning."""
        return self.bytes - self.before


def limiter() -> str | None:
    """Name of the means to limit a command's memory on this machine, page cache included: ``"cgroup"`` or
    ``"systemd-run"``; None if there is none."""
    if os.access(_CGROUP / "memory.limit_in_bytes", os.W_OK):
        return "cgroup"
    if shutil.which("systemd-run") and not subprocess.run(_scope(1 << 30, ["true"]), capture_output=True).returncode:
        return "systemd-run"
    return None


def run(command: Sequence[str], limit: int) -> tuple[subprocess.CompletedProcess[str], str | None]:
    """Runs ``command`` with at most ``limit`` bytes of memory; also returns what limited it, None for nothing.

    A command that needs more is killed by the kernel: its return code is not 0.
    """
    by = limiter()
    if by == "systemd-run":
        command = _scope(limit, command)
    with _group(limit) if by == "cgroup" else contextlib.nullcontext() as group:
        if group is not None:  # a shell joins the group, and becomes the command
            command = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh", *command]
        return subprocess.run(command, capture_output=True, text=True, check=False), by


def _scope(limit: int, command: Sequence[str]) -> list[str]:
    user = [] if os.geteuid() == 0 else ["--user"]
    return [
        "systemd-run", *user, "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0", "--", *command
    ]  # fmt: skip


@contextlib.contextmanager
def _group(limit: int) -> Iterator[Path]:
    group = _CGROUP / f"fp4dit-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(limit))
        yield group
    finally:
        group.rmdir()
