"""Files of tensors that share memory: each is written whole, without a copy of what is not written twice."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fp4dit_ao.checkpoint import tensor_files


def shared(dtype: torch.dtype) -> dict[str, Tensor]:
    whole = torch.randint(0, 256, (12, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).view(dtype)
    books = torch.arange(8, dtype=torch.uint8)
    return {
        "q": whole[:3], "k": whole[3:4], "v": whole[4:], "all": whole, "one": whole[5, 3], "across": whole[:, :2],
        "none": whole[:0], "q.books": books, "k.books": books, "alone": torch.ones(3),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.float32, torch.int64])
@pytest.mark.parametrize("max_shard_size", ["1GB", 200])
def test_shared_memory_is_written_for_each(dtype: torch.dtype, max_shard_size: int | str, tmp_path) -> None:
    tensors = shared(dtype)
    tensor_files.write(tensors, tmp_path, {}, max_shard_size)
    found = {name: x for path in tmp_path.glob("*.safetensors") for name, x in load_file(path).items()}
    assert found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
        assert torch.equal(
            found[name].contiguous().reshape(-1).view(torch.uint8), x.contiguous().reshape(-1).view(torch.uint8)
        )


def test_parts_of_one_tensor_are_not_copied() -> None:
    """A joined q, k and v of a large model, mapped from a file, would otherwise be in memory as a whole."""
    tensors = shared(torch.bfloat16)
    parts = {name: tensors[name] for name in ("q", "k", "v", "q.books", "k.books", "alone")}
    found = tensor_files._apart(parts)
    copied = [name for name, x in found.items() if x.data_ptr() != parts[name].data_ptr()]
    assert copied == ["k.books"]
    assert len({x.untyped_storage().data_ptr() for x in found.values()}) == len(parts)
