"""Nearest rounding of a model that does not fit into the memory that it is given."""

import mmap
import time
from pathlib import Path

import pytest

from benchmarks import bigger_than_memory, limited_memory
from fp4dit_ao.checkpoint import transformer_folder
from fp4dit_ao.util.mapped_files import anonymous_bytes

SLACK = 40e6
"""Bytes that Python and the C library take besides, whatever the model: a seventh of this small one."""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_the_command_needs_the_quantized_size_and_two_tensors(tmp_path: Path) -> None:
    large = bigger_than_memory.make(tmp_path / "float", 280e6, 1024, 60e6)
    assert 250e6 < large.nbytes < 310e6
    assert len(list((tmp_path / "float" / "transformer").glob("*.safetensors"))) >= 4  # shards
    # beside it there is room for imports alone, and for the pages of a shard; without a limiter the figure has to do
    row = bigger_than_memory.measured(large, "command", bigger_than_memory.Method("w4a6_e2m1"), 1.2e9, tmp_path / "q")
    assert row["quantized"] < 0.34 * large.nbytes  # a twentieth of this model, its modulation, is not quantized
    assert row["added"] < row["bound"] + SLACK < 0.6 * large.nbytes
    assert transformer_folder.read_record(tmp_path / "q" / "transformer").decisions


def test_a_peak_is_seen_and_a_mapped_file_is_not(tmp_path: Path) -> None:
    import torch

    (tmp_path / "file").write_bytes(bytes(40_000_000))
    with limited_memory.Peak() as mapped:
        torch.from_file(str(tmp_path / "file"), size=10_000_000).sum()
    assert mapped.added < 20e6
    size = 60_000_000  # not the allocator's, which may have as much to give again
    with limited_memory.Peak() as peak, mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        for _ in range(60):
            memory.write(bytes(size // 60))
        time.sleep(0.1)
    assert 55e6 < peak.added < 80e6
    after = anonymous_bytes()
    assert after - peak.before < 20e6


@pytest.mark.skipif(limited_memory.limiter() is None, reason="nothing here limits the memory of a command")
def test_a_command_that_needs_more_ends() -> None:
    code = "x = bytearray({}); print(len(x))"
    done, by = limited_memory.run(["python3", "-c", code.format(20_000_000)], 60_000_000)
    assert by and done.returncode == 0 and done.stdout == "20000000\n", done.stderr
    done, _ = limited_memory.run(["python3", "-c", code.format(90_000_000)], 60_000_000)
    assert done.returncode != 0
