"""Tensors in files: memory that the system can take back, and that a process's limit does not count as its own.

A file has lost its name by the time that its tensor is used, so its room on the disk is free again when the tensor is gone, or
the process, killed or not.
"""

import ctypes
import functools
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

SMALL = 2**16
"""Bytes up to which a tensor stays in memory: a file takes whole pages, and a place in the kernel's table of mappings."""
_WILL_NEED = 3
"""``MADV_WILLNEED``, on Linux and macOS."""


class MappedFiles:
    """Makes tensors on the CPU that are mapped from files in one folder.

    Args:
        folder: on a disk, not in memory (tmpfs); made where it is missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def empty(self, shape: Iterable[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor of zeros.

        Raises:
            OSError: there is no room on the disk, or the folder cannot be written; one sentence.
        """
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        if meta.nbytes <= SMALL:
            return torch.zeros_like(meta, device="cpu")
        path = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file, path = tempfile.mkstemp(".mapped", dir=self.folder)
            try:
                _reserve(file, meta.nbytes)  # writing to a mapped page without room on the disk kills the process
            finally:
                os.close(file)
            return torch.from_file(path, shared=True, size=meta.numel(), dtype=dtype).view(meta.shape)
        except OSError as error:
            raise OSError(
                f"cannot keep {meta.nbytes / 1e6:.1f} MB in a file in {self.folder}: {error.strerror or error}; make room on "
                "that disk, or allow more memory"
            ) from error
        finally:
            if path is not None:
                os.unlink(path)

    def keep(self, x: Tensor) -> Tensor:
        """``x`` in a file, laid out as it was; itself where it is small, or not on the CPU."""
        if x.nbytes <= SMALL or x.device.type != "cpu":
            return x
        strides = torch.empty_like(x, device="meta").stride()
        return self.empty(x.shape, x.dtype).as_strided(x.shape, strides).copy_(x)


def _reserve(file: int, nbytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.truncate(file, nbytes)


def will_need(tensors: Iterable[Tensor]) -> None:
    """Starts to read what of these tensors is mapped from files and not in memory, without waiting for it."""
    advise = _madvise()
    if advise is None:
        return
    for x in tensors:
        if x.device.type == "cpu" and type(x.detach()) is Tensor and x.nbytes:
            start = x.data_ptr() // _page() * _page()
            advise(ctypes.c_void_p(start), ctypes.c_size_t(x.data_ptr() + x.nbytes - start), _WILL_NEED)


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind; 0 where ``/proc`` does not say it."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:"))
    except (OSError, StopIteration):
        return 0


@functools.cache
def _page() -> int:
    return os.sysconf("SC_PAGE_SIZE")


@functools.cache
def _madvise() -> Callable[..., int] | None:
    try:
        found: Callable[..., int] = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # Windows
        return None
    return found
