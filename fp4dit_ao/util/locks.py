"""Locks between processes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

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
    try:
        file = _locked(path)
    except BlockingIOError as error:
        raise OSError(f"another process is writing {target}; wait for it, or name another folder") from error
    with file:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _locked(path: Path) -> IO[str]:
    """The file at ``path``, open and locked.

    Raises:
        BlockingIOError: another process holds it.
    """
    while True:
        file = path.open("w")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(path, file):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # whoever held it deleted it after it was opened here: another one may be at this path by now


def _is_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
