"""One process at a time writes to a folder."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from fp4dit_ao.util.locks import only_process


def test_a_second_one_is_refused_and_the_next_is_not(tmp_path: Path) -> None:
    with only_process(tmp_path / "out"):
        with (
            pytest.raises(OSError, match=r"another process is writing .*out; wait for it"),
            only_process(tmp_path / "out"),
        ):
            pass
        assert (tmp_path / "out.lock").exists()
        with only_process(tmp_path / "other"):
            pass
    assert not (tmp_path / "out.lock").exists()
    with only_process(tmp_path / "out"):
        pass


def test_a_file_that_its_holder_deletes_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder before lets go between opening and locking: a third process would then make, and lock, another file."""
    lock, flock = tmp_path / "out.lock", fcntl.flock
    deleted = []

    def late(file: Any, operation: int) -> None:
        if not deleted:
            deleted.append(lock.unlink())
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with only_process(tmp_path / "out"):
        assert deleted and lock.exists()
        with pytest.raises(OSError, match="another process is writing"), only_process(tmp_path / "out"):
            pass
