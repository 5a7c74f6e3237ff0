"""Locks between processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def only_process(target: Path) -> Iterator[None]:
    """Context that one process at a time can be in for ``target``; ``<target>.lock`` is there meanwhile.

    A process that dies lets go of it.

    Raises:
        OSError: another process is in it, or the lock cannot be written.
    """
    path = target.with_name(f"{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise OSError(f"another process is writing {target}; wait for it, or name another folder") from error
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)
