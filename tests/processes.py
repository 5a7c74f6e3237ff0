"""Processes of one gloo group on this machine, with a thread each."""

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def in_processes(work: Callable[..., None], *arguments: Any, count: int = 2) -> None:
    """Calls ``work(rank, *arguments)``, a function of a module, in ``count`` processes; raises if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, args=(count, port, work, arguments), nprocs=count)


def _process(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=120))
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()
