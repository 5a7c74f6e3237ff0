"""A failure while writing leaves what was there, and nothing else."""

import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from fp4dit_ao.util.atomic_files import whole_file, write_text


def test_a_file_and_its_folders_appear_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "a.txt", "ä\n")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "ä\n".encode()
    assert os.listdir(tmp_path / "deep" / "er") == ["a.txt"]


def test_the_file_is_not_there_before_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    with whole_file(target) as partial:
        partial.write_bytes(b"all of it")
        assert partial.name == target.name  # writers look at the suffix
        assert not target.exists()
    assert target.read_bytes() == b"all of it"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("too large"), KeyError("x")])
def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    known = isinstance(error, OSError | SafetensorError)
    with pytest.raises(OSError if known else KeyError) as found, whole_file(target) as partial:
        partial.write_text("ne")
        raise error
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]
    if known:
        reason = getattr(error, "strerror", None) or str(error)
        assert str(found.value) == f"cannot save to {target}: {reason}; nothing was written there"


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="it is a folder; nothing was written"):
        write_text(tmp_path, "text")
    assert os.listdir(tmp_path) == []
