"""Garbage collection that looks at new objects alone."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from fp4dit_ao.util.freed_memory import collecting_new_objects_alone


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
