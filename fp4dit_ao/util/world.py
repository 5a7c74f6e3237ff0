"""The processes that compute one result together: this one alone, or all that ``torchrun`` started.

Code that shares out work asks :func:`current` for its :class:`World` and calls the methods below, which are the identity in a
world of one. Only the process with rank 0 (``first``) writes files.

Results do not depend on how many processes there are. Sums are taken by pairs (:class:`PairwiseSum`): 0 and 1, 2 and 3, then
those sums, and so on. A process that holds 1, 2, 4, … consecutive parts computes a branch of that tree, and the rest of it is
computed over processes; collectives only move bytes, so every process gets the bits that one alone would.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fp4dit_ao.util.placement import on_device

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""Longest wait for another process; ``torchrun`` ends the others at once where one dies."""


class World:
    """One process.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def agreed(self, make: Callable[[], T]) -> T:
        """What ``make`` gives in the first process, or raises there; others do not call it."""
        return make()

    def gathered(self, own: T) -> list[T]:
        """What every process gives, by rank; tensors on the CPU where there are several."""
        return [own]

    def summed(self, x: Tensor) -> Tensor:
        """The pairwise sum of a tensor over processes, of the same shape; the same bits in each."""
        return x

    def of_first(self, x: Tensor) -> Tensor:
        """``x``, overwritten by the first process's tensor; that has the same shape and type."""
        return x


class _Processes(World):
    """The default process group. Objects are pickled on the way from one of its processes to another."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def agreed(self, make: Callable[[], T]) -> T:
        found: list[Any] = [None]
        if self.first:
            try:
                found = [(make(), None)]
            except Exception as error:
                dist.broadcast_object_list([(None, error)], src=0)
                raise
        dist.broadcast_object_list(found, src=0)
        value, failure = found[0]
        if failure is not None:
            raise failure
        return value

    def gathered(self, own: T) -> list[T]:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, on_device(own, "cpu"))
        return everyone

    def summed(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        length = -(-flat.numel() // self.size)
        sent = flat.new_zeros(length * self.size)
        sent[: flat.numel()] = flat
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent)
        branch = PairwiseSum()
        for part in received.chunk(self.size):
            branch.add([part])
        (own,) = branch.total()
        dist.all_gather_into_tensor(sent, own.contiguous())
        return sent[: flat.numel()].view_as(x)

    def of_first(self, x: Tensor) -> Tensor:
        sent = x.contiguous()
        dist.broadcast(sent.reshape(-1).view(torch.uint8), src=0)  # as bytes: gloo knows few types
        return x if sent is x else x.copy_(sent)


class PairwiseSum:
    """The sums of lists of tensors, added up by pairs; holds one list for each binary digit of their number."""

    def __init__(self) -> None:
        self._branches: list[tuple[int, list[Tensor]]] = []

    def add(self, part: Sequence[Tensor]) -> None:
        """Adds the next list; its tensors may be overwritten."""
        height, branch = 0, list(part)
        while self._branches and self._branches[-1][0] == height:
            height, branch = height + 1, _added(self._branches.pop()[1], branch)
        self._branches.append((height, branch))

    def total(self) -> list[Tensor]:
        """The sums of everything added so far."""
        _, whole = self._branches[-1]
        for _, branch in self._branches[-2::-1]:
            whole = _added(branch, whole)
        return whole


def _added(left: list[Tensor], right: list[Tensor]) -> list[Tensor]:
    return [a.add_(b) for a, b in zip(left, right, strict=True)]


_worlds: list[World] = [World()]


def current() -> World:
    """The world of this process: of one outside of :func:`joined`."""
    return _worlds[-1]


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """Context in which the processes that ``torchrun`` started share out work; a world of one without ``torchrun``.

    GPUs talk by NCCL, CPUs by gloo; a process takes the GPU of its local rank. A process group that exists already is used as
    it is.
    """
    started = dist.is_available() and not dist.is_initialized() and dist.is_torchelastic_launched()
    if started:
        _start()
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    _worlds.append(_Processes() if together else World())
    try:
        yield _worlds[-1]
    finally:
        _worlds.pop()
        if started:
            dist.destroy_process_group()


def _start() -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    gpu = local < torch.cuda.device_count()
    if gpu:
        torch.cuda.set_device(local)
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))  # type: ignore[attr-defined]
    # processes that torchrun starts again find the addresses of dead ones under the same names
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    fresh = dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=size, timeout=TIMEOUT)
