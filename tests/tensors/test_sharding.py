"""Quantized linears sharded over two processes by torch.distributed.tensor, beside the unsharded one."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fp4dit_ao import CodebookTensor, MinifloatTensor
from fp4dit_ao.formats import codebook_set
from fp4dit_ao.tensors.levels import LevelTensor
from fp4dit_ao.tensors.whole_tokens import WholeTokens, widened
from tests.processes import in_processes

ROWS, COLUMNS, GROUP = 48, 256, 64
PROCESSES = 2


def linear(kind: str) -> nn.Linear:
    """The same in every process. ``kind``: how the input and the weight are stored."""
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS)
    packed = MinifloatTensor.from_hp(
        layer.weight.detach(), [1, GROUP], "nf4" if kind == "nf4" else "e2m1", None if kind == "float input" else "e2m3"
    )
    weight = LevelTensor.from_packed(packed, "int8") if kind == "levels" else packed
    if kind == "a scale a row":
        weight = MinifloatTensor.from_hp(layer.weight.detach(), [1, -1], "e2m1", "e2m3")
    if kind.startswith("codebook"):
        codes, index = (torch.randint(0, 16, (ROWS, n), dtype=torch.uint8) for n in (COLUMNS, COLUMNS // 32))
        books = codebook_set("nf4_groups").tensor()
        parts = codes, index, torch.rand(ROWS) / 500, books, "nf4_groups", "e2m3", torch.float32
        weight = CodebookTensor.from_codes(*parts)
        weight = LevelTensor.from_packed(weight, "int8") if kind == "codebook levels" else weight
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def tokens() -> Tensor:
    return torch.randn(3, 5, COLUMNS, generator=torch.Generator().manual_seed(1))


def check_rows(kind: str, mesh: DeviceMesh, rank: int, source: int | None) -> None:
    """Each process has half of the outputs: the same bits."""
    layer, x = linear(kind), tokens()
    expected = layer(x)
    model = parallelize_module(nn.Sequential(layer), mesh, {"0": ColwiseParallel()}, src_data_rank=source)
    local = model[0].weight.to_local()
    assert type(local) is type(linear(kind).weight.data)
    assert local.shape == (ROWS // PROCESSES, COLUMNS)
    assert torch.equal(model(x), expected.chunk(PROCESSES, -1)[rank])


def check_columns(kind: str, mesh: DeviceMesh, rank: int, source: int | None) -> None:
    """Each process has half of the inputs, and quantizes its half of a token: two linears, added up in float32."""
    layer, x = linear(kind), tokens()
    weight = layer.weight.data
    halves = zip(x.chunk(PROCESSES, -1), weight.chunk(PROCESSES, 1), strict=True)
    expected = sum(F.linear(part, columns) for part, columns in halves) + layer.bias
    unsharded, exact = layer(x), F.linear(x, weight.dequantize(), layer.bias)
    model = parallelize_module(nn.Sequential(layer), mesh, {"0": RowwiseParallel()}, src_data_rank=source)
    assert model[0].weight.to_local().shape == (ROWS, COLUMNS // PROCESSES)
    got = model(x.chunk(PROCESSES, -1)[rank].contiguous())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    if kind == "float input":
        torch.testing.assert_close(got, unsharded, rtol=1e-5, atol=1e-5)
    else:
        errors = [(y - exact).norm() / exact.norm() for y in (got, unsharded)]
        assert errors[0] <= 1.1 * errors[1], "a scale for half a token is no coarser than one for all of it"


def check_whole_tokens(kind: str, mesh: DeviceMesh, rank: int, source: int | None) -> None:
    """Each process has half of the inputs and the scale of whole tokens: what one process computes, added up in float32."""
    layer, x = linear(kind), tokens()
    expected = layer(x)
    model = parallelize_module(nn.Sequential(layer), mesh, {"0": WholeTokens()}, src_data_rank=source)
    assert COLUMNS // PROCESSES < model[0].weight.to_local().shape[1] <= COLUMNS // PROCESSES + 64
    got = model(x.chunk(PROCESSES, -1)[rank].contiguous())
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def check_two_layers(mesh: DeviceMesh) -> None:
    """Column-wise, then row-wise: a feed-forward network, of which a process has half."""
    up, down = linear("codebook"), linear("a scale a row")
    up.weight = nn.Parameter(torch.cat([up.weight.data] * 6)[:COLUMNS], requires_grad=False)
    up.bias = nn.Parameter(torch.zeros(COLUMNS))
    model, x = nn.Sequential(up, nn.GELU(), down), tokens()
    expected = model(x)
    plan = {"0": ColwiseParallel(), "2": WholeTokens()}
    torch.testing.assert_close(parallelize_module(model, mesh, plan)(x), expected, rtol=2e-6, atol=2e-6)


def check_distributed_tensors(mesh: DeviceMesh, rank: int) -> None:
    """Process 0 has the weight; the others' is overwritten by what it sends."""
    whole = linear("packed").weight.data
    mine = whole if rank == 0 else torch.empty_like(whole)
    parts = {Shard(0): whole.chunk(PROCESSES)[rank], Shard(1): whole.chunk(PROCESSES, 1)[rank], Replicate(): whole}
    for placement, expected in parts.items():
        local = distribute_tensor(mine, mesh, [placement]).to_local()
        assert torch.equal(local.dequantize(), expected.dequantize()), placement


def process(rank: int) -> None:
    mesh = init_device_mesh("cpu", (PROCESSES,))
    with torch.no_grad():
        for source in (None, 0):  # every process has the weight; or process 0 sends the parts
            for kind in ("packed", "float input", "levels", "codebook"):
                check_rows(kind, mesh, rank, source)
            for kind in ("packed", "float input", "levels"):
                check_columns(kind, mesh, rank, source)
            for kind in ("packed", "levels", "a scale a row", "codebook", "codebook levels"):
                check_whole_tokens(kind, mesh, rank, source)
        check_two_layers(mesh)
        check_distributed_tensors(mesh, rank)


def test_two_processes_compute_what_one_does() -> None:
    in_processes(process, count=PROCESSES)


def test_zeros_stand_behind_each_part() -> None:
    for kind in ("packed", "nf4", "levels", "a scale a row", "codebook", "codebook levels"):
        weight = linear(kind).weight.data
        wide, added = widened(weight, 4)
        values = wide.dequantize().unflatten(1, (4, -1))
        assert torch.equal(values[..., :-added].flatten(1), weight.dequantize()), kind
        assert not values[..., -added:].any(), kind


def test_parts_that_split_a_group_are_refused() -> None:
    with pytest.raises(ValueError, match=r"its 256 columns are no 8 equal parts of whole groups \(64 columns\)"):
        widened(linear("packed").weight.data, 8)
    without = linear("codebook").weight.data
    with pytest.raises(ValueError, match="no codebook has a zero"):
        widened(without.with_parts(codebooks=torch.full_like(without.codebooks, 3)), 2)
