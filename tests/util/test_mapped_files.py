"""Tensors in files: they hold what they are given, take no anonymous memory, and leave nothing behind."""

import ctypes
import errno
import gc
import mmap
import os
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fp4dit_ao.util import mapped_files
from fp4dit_ao.util.mapped_files import SMALL, MappedFiles, anonymous_bytes, will_need


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
def test_values_and_layout_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    files = MappedFiles(tmp_path / "new")
    x = (100 * torch.randn(300, 400)).to(dtype).T
    y = files.keep(x)
    assert y.dtype == dtype and y.stride() == x.stride() and torch.equal(x, y)
    assert y.data_ptr() != x.data_ptr()
    assert not list(files.folder.iterdir())  # it has no name any more
    y.zero_()
    assert not torch.equal(x, y)


def test_expanded_tensors_are_kept_whole(tmp_path: Path) -> None:
    x = torch.randn(1, 500).expand(300, 500)
    assert torch.equal(MappedFiles(tmp_path).keep(x), x)


def test_small_tensors_stay_where_they_are(tmp_path: Path) -> None:
    files = MappedFiles(tmp_path)
    x = torch.ones(SMALL, dtype=torch.uint8)
    assert files.keep(x) is x
    assert torch.equal(files.empty([2, 3], torch.float32), torch.zeros(2, 3))


@pytest.mark.skipif(not anonymous_bytes(), reason="anonymous memory is read from /proc")
def test_they_take_no_anonymous_memory(tmp_path: Path) -> None:
    before = anonymous_bytes()
    x = MappedFiles(tmp_path).empty([10_000, 1000], torch.float32).fill_(1)
    assert anonymous_bytes() - before < 5e6
    # not the allocator's, which may have as much to give again
    with mmap.mmap(-1, x.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(x.nbytes))
        assert anonymous_bytes() - before > 35e6
    assert bool((x == 1).all())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_no_file_stays_open(tmp_path: Path) -> None:
    gc.collect()  # of what other tests have kept
    files, before = MappedFiles(tmp_path), len(os.listdir("/proc/self/fd"))
    kept = [files.empty([100_000], torch.uint8) for _ in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    maps = Path("/proc/self/maps").read_text().count(".mapped (deleted)")
    del kept
    gc.collect()
    assert Path("/proc/self/maps").read_text().count(".mapped (deleted)") == maps - 20


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="files are not given room ahead")
def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        OSError, match=r"cannot keep 4\.0 MB in a file in .*No space left.*; make room on that disk, or allow"
    ):
        MappedFiles(tmp_path).empty([1_000_000], torch.float32)
    assert not list(tmp_path.iterdir())


def _in_memory(x: Tensor) -> int:
    """Pages of a mapped tensor that the system holds in memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    start = x.data_ptr() // page * page
    length = x.data_ptr() + x.nbytes - start
    found = (ctypes.c_ubyte * -(-length // page))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(length), found) == 0
    return sum(byte & 1 for byte in found)


@pytest.mark.skipif(mapped_files._madvise() is None or not hasattr(os, "posix_fadvise"), reason="needs madvise")
def test_what_will_be_needed_is_read_ahead(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(2_000_000))
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    x = torch.from_file(str(path), size=500_000)
    before = _in_memory(x)
    if before > 100:
        pytest.skip("this file system keeps files in memory")
    will_need([x, torch.empty(0), torch.ones(3)])
    for _ in range(100):
        if _in_memory(x) > 400:
            return
        time.sleep(0.05)
    raise AssertionError(f"{_in_memory(x)} pages are in memory")
