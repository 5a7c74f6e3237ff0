"""Folders and files that are written whole or not at all."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError


@contextlib.contextmanager
def whole_folder(target: str | Path, replaceable: bool = False, own: Sequence[str] = ()) -> Iterator[Path]:
    """A new folder to write into, ``<target>.partial-…``, renamed to ``target`` at the end; removed if anything fails.

    Args:
        target: where the folder shall be in the end; may exist if empty.
        replaceable: whether it may also exist with content. Entries that the new folder lacks are then kept.
        own: globs of names that are not kept.

    Raises:
        FileExistsError: ``target`` exists and may not be replaced.
        OSError: it cannot be written (permissions, disk full); one sentence, nothing left behind.
    """
    target = Path(target)
    if target.is_symlink() or target.exists():
        if not target.is_dir():
            raise FileExistsError(f"cannot save to {target}: it is a file; name a new folder")
        if any(target.iterdir()) and not replaceable:
            raise FileExistsError(f"cannot save to {target}: the folder is not empty; name a new one, or empty it")
        target = target.resolve()
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        yield partial
        _put(partial, target, own)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot save to {target}: {reason}; nothing was written there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """A file of ``target``'s name in a new folder to write to, moved to ``target`` at the end; removed if anything fails.

    Args:
        target: where the file shall be in the end; one that is there is replaced.

    Raises:
        OSError: it cannot be written (permissions, disk full); one sentence, nothing left behind.
    """
    target = Path(target)
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        if target.is_dir():
            raise IsADirectoryError("it is a folder")
        partial.mkdir(parents=True)
        yield partial / target.name
        (partial / target.name).replace(target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot save to {target}: {reason}; nothing was written there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: Path, target: Path, own: Sequence[str]) -> None:
    """Rename ``partial`` to ``target``; what was there is put back if that fails."""
    if not target.exists():
        partial.rename(target)
        return
    old = partial.with_name(partial.name.replace(".partial-", ".old-"))
    target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        old.rename(target)
        raise
    for entry in old.iterdir():
        if not (target / entry.name).exists() and not any(fnmatchcase(entry.name, glob) for glob in own):
            os.rename(entry, target / entry.name)
    shutil.rmtree(old, ignore_errors=True)
