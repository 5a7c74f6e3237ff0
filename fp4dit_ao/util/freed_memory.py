"""Memory that was freed, and that the C library keeps for later."""

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator

WORTH_IT = 2**20
"""Elements of tensors from which on their intermediates are worth returning: what they leave in the heap is in megabytes."""

LARGE = 2**20
"""Bytes of a tensor from which on its memory may be asked for by itself."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
"""glibc's numbers of the options (malloc.h)."""
_LARGEST = 2**25
"""Bytes up to which glibc raises its threshold by itself, on a 64-bit system."""


class _Since:
    """Elements that were worked on since memory was last returned."""

    elements = 0


def return_freed(elements: int) -> None:
    """Gives memory that is free back to the system, after work on a tensor of ``elements``, or on several that are as many as
    :data:`WORTH_IT` together; where the C library is not glibc, nothing happens.

    Tensors are aligned, and glibc seldom takes an aligned block for another one of the same size: the intermediates of one
    weight after another would add up to several times what is kept of them.
    """
    _Since.elements += elements
    trim = _function("malloc_trim")
    if trim is not None and _Since.elements >= WORTH_IT:
        trim(0)
        _Since.elements = 0


@contextlib.contextmanager
def large_tensors_apart() -> Iterator[None]:
    """Context in which glibc asks the system for each large tensor's memory and gives it back when the tensor is freed.

    Otherwise it soon takes tensors of up to 32 MiB from its heap, where those of a step leave holes.
    It costs page faults. Behind the context glibc does what it does by itself after it has freed such a tensor.
    """
    set_option = _function("mallopt")
    if set_option is None:
        yield
        return
    set_option(_MMAP_THRESHOLD, LARGE)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _LARGEST)
        set_option(_TRIM_THRESHOLD, 2 * _LARGEST)


@contextlib.contextmanager
def collecting_new_objects_alone() -> Iterator[None]:
    """Context in which the garbage collector does not look at objects that were there before it.

    The graph of a large model has millions of them: looking at all takes longer than the work on one weight.
    """
    if gc.get_freeze_count():  # somebody else's, who may want them to stay frozen
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of glibc."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library; Windows
        return None
    return found
