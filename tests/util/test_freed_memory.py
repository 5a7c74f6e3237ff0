"""Garbage collection that looks at new objects alone; memory of large tensors that goes back when they are freed."""

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import torch

from fp4dit_ao.util import freed_memory
from fp4dit_ao.util.freed_memory import collecting_new_objects_alone, large_tensors_apart
from fp4dit_ao.util.mapped_files import anonymous_bytes
from tests.conftest import ROOT


class Cycle:
    """An object that only the garbage collector can let go of."""

    def __init__(self) -> None:
        self.itself = self


def garbage() -> "weakref.ref[Cycle]":
    return weakref.ref(Cycle())


@pytest.fixture(autouse=True)
def _asked_for() -> Iterator[None]:
    """The collector runs when a test asks for it."""
    gc.disable()
    yield
    gc.unfreeze()
    gc.enable()


def test_old_garbage_waits_until_the_end() -> None:
    old = garbage()
    with collecting_new_objects_alone():
        new = garbage()
        gc.collect()
        assert new() is None
        assert old() is not None
    gc.collect()
    assert old() is None


def test_an_error_ends_it_too() -> None:
    with pytest.raises(KeyError), collecting_new_objects_alone():
        raise KeyError
    assert gc.get_freeze_count() == 0


def test_what_somebody_else_froze_stays_frozen() -> None:
    gc.freeze()
    with collecting_new_objects_alone():
        new = garbage()
        gc.collect()
        assert new() is None
    assert gc.get_freeze_count() > 0


def bytes_that_holes_leave() -> int:
    """Bytes that stay resident after twenty tensors of 8 MiB are freed, each followed by a small tensor that is kept."""
    first = torch.ones(2**21)
    del first  # glibc takes its like from the heap from now on, unless it was told otherwise
    before = anonymous_bytes()
    pairs = [[torch.ones(2**21), torch.ones(64)] for _ in range(20)]
    assert anonymous_bytes() - before > 18 * 2**23
    kept = [pair.pop() for pair in pairs]
    pairs.clear()
    left = anonymous_bytes() - before
    assert len(kept) == 20
    return left


def printed_by_a_fresh_process(call: str) -> int:
    """What ``call`` of this module returns where no other test has left holes in the heap, which large tensors fill first."""
    code = f"from tests.util import test_freed_memory as module; print(module.{call})"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, cwd=ROOT)
    return int(done.stdout.splitlines()[-1])


def bytes_that_holes_leave_in_the_context() -> int:
    with large_tensors_apart():
        return bytes_that_holes_leave()


@pytest.mark.skipif(freed_memory._function("mallopt") is None, reason="not glibc")
def test_freed_tensors_leave_no_holes() -> None:
    assert printed_by_a_fresh_process("bytes_that_holes_leave_in_the_context()") < 2**23
    assert printed_by_a_fresh_process("bytes_that_holes_leave()") > 2**23


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freed_memory, "_function", lambda name: None)
    with large_tensors_apart():
        pass
    freed_memory.return_freed(2**30)
