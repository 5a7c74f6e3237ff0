"""Writing folders and files whole or not at all."""

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
    """New folder to write into, ``<target>.partial-…``, which is renamed to ``target`` at the end; removed if anything
    fails.

    Args:
        target: the final place of the folder; it may exist if it is empty.
        replaceable: whether ``target`` may also exist with content. Entries that the new folder lacks are then kept.
        own: globs over names of old entries that are not kept.

    Raises:
        FileExistsError: ``target`` exists and may not be replaced.
        OSError: the folder cannot be written (permissions, disk full); one sentence, and an existing folder is as it
            was.
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
        raise OSError(f"cannot save to {target}: {_reason(error)}; nothing was written there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def whole_file(target: str | Path) -> Iterator[Path]:
    """Path to write a file to, which is moved to ``target`` at the end, and removed if anything fails.

    The path has the name of ``target``, in a new folder beside it; missing parents of ``target`` are created.

    Args:
        target: the final place of the file; an existing file is replaced.

    Raises:
        OSError: the file cannot be written (permissions, disk full); one sentence, an existing file is as it was.
    """
    target = Path(target)
    partial = target.with_name(f"{target.name}.partial-{uuid.uuid4().hex[:8]}")
    try:
        if target.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        partial.mkdir(parents=True)
        yield partial / target.name
        (partial / target.name).replace(target)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot save to {target}: {_reason(error)}; nothing was written there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(target: str | Path, text: str) -> None:
    """Writes ``text`` to ``target`` as UTF-8: afterwards the file is either the old or the new one, never half of it.

    Raises:
        OSError: see :func:`whole_file`.
    """
    with whole_file(target) as partial:
        partial.write_text(text, encoding="utf-8")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _put(partial: Path, target: Path, own: Sequence[str]) -> None:
    """Renames ``partial`` to ``target``; a folder that was there is put back if that fails."""
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
