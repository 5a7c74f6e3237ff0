"""Quantized linears sharded over two processes by torch.distributed.tensor, beside the unsharded one."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fp4dit_ao import MinifloatTensor
from fp4dit_ao.tensors.levels import LevelTensor

ROWS, COLUMNS, GROUP = 48, 256, 64
PROCESSES = 2


def linear(kind: str) -> nn.Linear:
    """The same in every process. ``kind``: how the input and the weight are stored."""
    torch.manual_seed(0)
    layer = nn.Linear(COLUMNS, ROWS)
    packed = MinifloatTensor.from_hp(
        layer.weight.detach(), [1, GROUP], "e2m1", None if kind == "float input" else "e2m3"
    )
    weight = LevelTensor.from_packed(packed, "int8") if kind == "levels" else packed
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


def check_distributed_tensors(mesh: DeviceMesh, rank: int) -> None:
    """Process 0 has the weight; the others' is overwritten by what it sends."""
    whole = linear("packed").weight.data
    mine = whole if rank == 0 else torch.empty_like(whole)
    parts = {Shard(0): whole.chunk(PROCESSES)[rank], Shard(1): whole.chunk(PROCESSES, 1)[rank], Replicate(): whole}
    for placement, expected in parts.items():
        local = distribute_tensor(mine, mesh, [placement]).to_local()
        assert torch.equal(local.dequantize(), expected.dequantize()), placement


def process(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=120))
    try:
        mesh = init_device_mesh("cpu", (PROCESSES,))
        with torch.no_grad():
            for kind in ("packed", "float input", "levels"):
                for source in (None, 0):  # every process has the weight; or process 0 sends the parts
                    check_rows(kind, mesh, rank, source)
                    check_columns(kind, mesh, rank, source)
            check_distributed_tensors(mesh, rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_compute_what_one_does() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, args=(port,), nprocs=PROCESSES)
