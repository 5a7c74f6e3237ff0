"""Processes that compute one result: the same sums whatever their number, one that decides, failures that reach all."""

import pytest
import torch
from torch import Tensor

from fp4dit_ao.util.placement import on_device
from fp4dit_ao.util.world import PairwiseSum, World, current, joined
from tests.processes import in_processes


def parts(count: int) -> list[Tensor]:
    """Numbers of many magnitudes, so that the order of additions shows in float32."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(37, generator=generator) * 10.0 ** (i % 5) for i in range(count)]


def by_pairs(values: list[Tensor]) -> Tensor:
    """0 and 1, 2 and 3, …, an odd one as it is; then those."""
    while len(values) > 1:
        values = [sum(values[i + 1 : i + 2], values[i]) for i in range(0, len(values), 2)]
    return values[0]


def total(values: list[Tensor]) -> Tensor:
    found = PairwiseSum()
    for value in values:
        found.add([value.clone()])
    return found.total()[0]


@pytest.mark.parametrize("count", range(1, 14))
def test_sums_are_taken_by_pairs(count: int) -> None:
    assert torch.equal(total(parts(count)), by_pairs(parts(count)))


@pytest.mark.parametrize(("processes", "each"), [(2, 4), (4, 2), (8, 1), (3, 2), (3, 4), (5, 1)])
def test_a_sum_of_branches_is_the_sum_of_all(processes: int, each: int) -> None:
    values = parts(processes * each)
    branches = [total(values[i : i + each]) for i in range(0, len(values), each)]
    assert torch.equal(total(branches), by_pairs(values))
    assert not torch.equal(by_pairs(values), sum(values[1:], values[0])), "or the order would not matter here"


def test_one_process_is_a_world() -> None:
    x = torch.ones(3)
    with joined() as world:
        assert world is current()
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert world.gathered("own") == ["own"]
        assert world.agreed(lambda: 5) == 5
        assert world.summed(x) is x
        assert world.of_first(x) is x


def test_what_stands_in_two_places_is_moved_once() -> None:
    x = torch.ones(3)
    moved = on_device({"a": [x, 1], "b": x}, "meta")
    assert moved["a"][0] is moved["b"]
    assert moved["a"][1] == 1


def process(rank: int) -> None:
    assert type(current()) is World, "a process group alone shares nothing out"
    with joined() as world:
        assert current() is world
        assert (world.rank, world.size, world.first) == (rank, 3, rank == 0)
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            values = [x.to(dtype).view(1, 37) for x in parts(6)]
            own = total(values[2 * rank : 2 * rank + 2])
            assert torch.equal(world.summed(own), by_pairs(values)), dtype
        assert world.gathered({rank: torch.full((2,), rank)}).__repr__().count("tensor") == 3
        assert world.agreed(lambda: f"by {rank}") == "by 0"
        mine = torch.full((2, 3), float(rank), dtype=torch.bfloat16).t()
        assert world.of_first(mine) is mine
        assert bool((mine == 0).all())
        with pytest.raises(FileExistsError, match="of 0"):
            world.agreed(lambda: refuse(rank))


def refuse(rank: int) -> None:
    raise FileExistsError(f"of {rank}")


def test_three_processes_get_the_bits_of_one() -> None:
    in_processes(process, count=3)
