"""Rows in shards: the mean over all rows, and the same bits from one process and from two, one of which may die on the way."""

import copy
import functools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import AdaRoundConfig, FP4DiTQuantizer, ReconstructionConfig, capture, reconstruct, w4a6
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction.iteration import Iteration
from fp4dit_ao.passes.reconstruction.shards import Shards, divide
from fp4dit_ao.util.world import World, joined
from tests.graphs import TinyDiT, tiny_sample
from tests.processes import in_processes

DATA = [tiny_sample(seed=seed, tokens=9 if seed % 3 == 2 else 6) for seed in range(6)]
LEARNED = AdaRoundConfig(iters=12, batch_size=8, relative_lr=0.5, shards=2)
CONFIGS = (
    LEARNED,
    replace(LEARNED, patience=2, bfloat16=True, warmup=0.5),
    ReconstructionConfig("gptq", batch_size=4, shards=2),
    ReconstructionConfig("sign_gradient", objective="layer_weighted", scope="window", iters=4, batch_size=5, shards=4),
    ReconstructionConfig("discquant", objective="prediction_difference", iters=3, batch_size=6, shards=2),
)


@functools.cache
def prepared(layers: int = 2) -> torch.fx.GraphModule:
    graph = prepare_pt2e(capture(TinyDiT(layers=layers), DATA[0]), FP4DiTQuantizer().set_global(w4a6()))
    with torch.no_grad():
        graph(**DATA[0])
    return graph


def settled(graph: torch.fx.GraphModule) -> list[Tensor]:
    return [x for _, o in weight_observers(graph) for x in (o.codes, o.scale) if x is not None]


def rounded(
    graph: torch.fx.GraphModule, config: ReconstructionConfig, **options: Any
) -> tuple[list[Tensor], list[Any]]:
    """Codes, scales, and all of the report but seconds."""
    own = copy.deepcopy(graph)
    report = reconstruct(own, DATA, config, progress=False, **options)
    return settled(own), [replace(row, seconds=0.0) for row in report.rows]


def same(a: tuple[list[Tensor], list[Any]], b: tuple[list[Tensor], list[Any]]) -> bool:
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def division(count: int, batch_size: int = 8, world: World | None = None) -> Shards:
    return divide(prepared(1), DATA, count, batch_size, world or World())


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_as_many_rows_are_drawn_from_every_shard(count: int) -> None:
    shards = division(count)
    assert sum(shards.rows) == shards.total_rows == 12
    drawn = [len(rows) for rows in shards.draw(8, torch.Generator().manual_seed(0))]
    assert sum(drawn) == 8
    assert max(drawn) - min(drawn) <= 1
    assert shards.chunk == max(drawn)


def test_every_row_is_drawn_equally_often_in_the_mean() -> None:
    """Shards of 4 and 2 rows: a row's expected weight is a twelfth, whichever it is in."""
    shards = division(5, 5)
    assert shards.rows == [4, 2, 2, 2, 2]
    generator, weight = torch.Generator().manual_seed(0), [torch.zeros(rows) for rows in shards.rows]
    for _ in range(2000):
        for shard, rows in zip(shards.own, shards.draw(5, generator), strict=True):
            weight[shard.number][rows] += shards.share(shard) / len(rows) / 2000
    torch.testing.assert_close(torch.cat(weight), torch.full((12,), 1 / 12), rtol=0.1, atol=0)


@pytest.mark.parametrize("config", [replace(LEARNED, iters=1, warmup=0.0), ReconstructionConfig("gptq")])
def test_shards_change_the_order_of_sums_alone(config: ReconstructionConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows in one step: gradients, Hessians and errors are those of one shard, up to float32's last bits."""
    sums, sum_tensors = [], Shards.sum_tensors
    monkeypatch.setattr(Shards, "sum_tensors", lambda self, of: sums.append(sum_tensors(self, of)) or sums[-1])
    found = []
    for shards in (1, 3):
        sums.clear()
        _, (row,) = rounded(prepared(1), replace(config, batch_size=12, shards=shards))
        found.append((row.loss_before, [x.clone() for x in sums[0]]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for one, three in zip(found[0][1], found[1][1], strict=True):
        assert one.norm() > 0
        assert (one - three).norm() < 1e-6 * one.norm()


class Of(World):
    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size


def test_shards_that_cannot_be_shared_out_are_refused() -> None:
    for count, world, message in (
        (7, World(), "6 samples for 7 shards"),
        (6, Of(0, 2), "6 shards for 2 processes; each must hold the same number of them, a power of two"),
        (3, Of(0, 2), "3 shards for 2 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            division(count, world=world)
    with pytest.raises(ValueError, match=r"4 rows per step \(batch_size\) for 5 shards"):
        division(5, 4)
    with pytest.raises(ValueError, match="shards=0"):
        ReconstructionConfig(shards=0)


def test_processes_hold_the_shards_one_after_the_other() -> None:
    whole = division(4)
    for rank in range(2):
        own = division(4, world=Of(rank, 2))
        assert [shard.number for shard in own.own] == [2 * rank, 2 * rank + 1]
        assert own.rows == whole.rows
        for shard in own.own:
            mine = [own.streams[i] for i in shard.streams]
            theirs = [whole.streams[i] for i in whole.own[shard.number].streams]
            for a, b in zip(mine, theirs, strict=True):
                assert all(torch.equal(x, b.full[name]) for name, x in a.full.items() if isinstance(x, Tensor))


def dies(rank: int, folder: Path) -> None:
    """Process 1 is killed in the third step of the second block."""
    if rank == 1:
        steps, gradients = [0], Iteration._learned_from

        def counted(*args: Any) -> list[Tensor]:
            steps[0] += 1
            if steps[0] > 12 + 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return gradients(*args)

        Iteration._learned_from = counted  # type: ignore[method-assign]
    with joined():
        rounded(prepared(), LEARNED, checkpoint_dir=folder / str(rank))


def resumes(rank: int, folder: Path) -> None:
    graph = prepared()
    alone = rounded(graph, LEARNED)
    with joined():
        assert same(rounded(graph, LEARNED, checkpoint_dir=folder / str(rank)), alone), "resumed"
    for config in CONFIGS:
        alone = rounded(graph, config)
        with joined():
            assert same(rounded(graph, config), alone), config.rounding
    with joined(), pytest.raises(ValueError, match="different models, settings or calibration data"):
        rounded(graph, replace(LEARNED, seed=rank), checkpoint_dir=folder / "other")
    with joined(), pytest.raises(ValueError, match="belongs to another run"):
        rounded(graph, replace(LEARNED, seed=5), checkpoint_dir=folder / str(rank))


def test_two_processes_give_the_bits_of_one_and_resume_when_one_was_killed(tmp_path: Path) -> None:
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        in_processes(dies, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["0"], "the first process alone writes"
    assert [path.name for path in (tmp_path / "0").iterdir()] == ["block-000.safetensors"]
    in_processes(resumes, tmp_path)
