"""Reconstruction in limited memory: the same bits, with everything but the unit at work in files."""

import copy
import gc
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

from fp4dit_ao import AdaRoundConfig, FP4DiTQuantizer, ReconstructionConfig, capture, reconstruct, w4a6
from fp4dit_ao.checkpoint.graph_tensors import flatten, state_of
from fp4dit_ao.config import w4a6_codebook
from fp4dit_ao.passes.partition import weight_observers
from fp4dit_ao.passes.reconstruction import engine, memory_budget
from fp4dit_ao.passes.reconstruction.unit_rounding import round_unit
from fp4dit_ao.passes.streamed_lowering import convert_and_lower
from fp4dit_ao.util import mapped_files
from fp4dit_ao.util.freed_memory import WORTH_IT, return_freed
from fp4dit_ao.util.mapped_files import MappedFiles, anonymous_bytes
from fp4dit_ao.util.tensor_state import bytes_of
from tests.graphs import TinyDiT, tiny_sample

LEARNED = AdaRoundConfig(iters=20, batch_size=3, relative_lr=0.5)
SCALES = ReconstructionConfig("sign_gradient", scope="window", iters=60, batch_size=3)
SLACK = 15e6
"""Bytes of the graph's pieces, one a unit, and of what the C library keeps: a fifth of what the test gives."""
GPTQ = ReconstructionConfig("gptq", batch_size=3)


class Kept(list[Tensor]):
    """All tensors that were put into files."""

    def streams(self) -> list[Tensor]:
        """Values of all 8 rows of 6 tokens."""
        return [x for x in self if tuple(x.shape[:2]) == (8, 6)]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kept]:
    """Even the smallest tensors go into files, and the process has taken nothing before."""
    found, make = Kept(), MappedFiles.empty

    def empty(*arguments: Any) -> Tensor:
        found.append(make(*arguments))
        return found[-1]

    monkeypatch.setattr(mapped_files, "SMALL", 0)
    monkeypatch.setattr(MappedFiles, "empty", empty)
    monkeypatch.setattr(engine, "anonymous_bytes", lambda: 0)
    yield found


def prepare(recipe: Any = w4a6, layers: int = 3) -> tuple[torch.fx.GraphModule, list[dict[str, Tensor]]]:
    data = [tiny_sample(seed=seed) for seed in range(4)]
    prepared = prepare_pt2e(capture(TinyDiT(layers=layers), data[0]), FP4DiTQuantizer().set_global(recipe()))
    with torch.no_grad():
        for sample in data:
            prepared(**sample)
    return prepared, data


def least(prepared: torch.fx.GraphModule, data: Any, config: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The least amount of memory that is not refused."""
    needs = []
    monkeypatch.setattr(engine, "check", lambda *a: (needs.append(a[2].total), memory_budget.check(*a))[1])
    with pytest.raises(ValueError, match="are too little"):
        reconstruct(copy.deepcopy(prepared), data, config, checkpoint_dir=folder / "none", memory=1, progress=False)
    return int(needs[0])


def state(prepared: torch.fx.GraphModule) -> list[Tensor]:
    """Codes, scales and whatever else weight observers hold."""
    return [x for _, observer in weight_observers(prepared) for _, x in observer.named_buffers(recurse=False)]


@pytest.mark.parametrize(
    ("config", "recipe"),
    [(LEARNED, w4a6), (SCALES, w4a6), (GPTQ, w4a6_codebook)],
    ids=["learned", "scales, too", "closed form"],
)
def test_files_change_no_bit(config, recipe, kept, tmp_path, monkeypatch) -> None:
    prepared, data = prepare(recipe)
    limited, roomy = copy.deepcopy(prepared), copy.deepcopy(prepared)
    memory = least(prepared, data, config, tmp_path, monkeypatch)
    expected = reconstruct(prepared, data, config, progress=False)
    kept.clear()
    folder = tmp_path / "limited"
    found = reconstruct(limited, data, config, checkpoint_dir=folder, memory=memory, progress=False)
    assert kept.streams()
    assert [(row.loss_after, row.kept) for row in found.rows] == [(row.loss_after, row.kept) for row in expected.rows]
    assert any(row.kept in ("learned", "solved") for row in found.rows)
    assert all(bytes_of(x) == bytes_of(y) for x, y in zip(state(limited), state(prepared), strict=True))
    places = {x.data_ptr() for x in kept}
    assert places.issuperset(o.codes.data_ptr() for _, o in weight_observers(limited) if o.codes is not None)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    kept.clear()
    reconstruct(roomy, data, config, checkpoint_dir=tmp_path / "roomy", memory=10 * memory, progress=False)
    assert not kept.streams()

    in_memory, in_files = convert_and_lower(prepared), convert_and_lower(limited, None, MappedFiles(tmp_path))
    wanted, got = ({k: x.detach() for k, x in state_of(graph).items()} for graph in (in_memory, in_files))
    assert wanted.keys() == got.keys()
    places = {x.data_ptr() for x in kept}
    for name, x in wanted.items():
        parts, found_parts = flatten(name, x), flatten(name, got[name])
        assert all(bytes_of(y) == bytes_of(found_parts[part]) for part, y in parts.items())
        assert places.issuperset(y.data_ptr() for y in found_parts.values())


def test_a_killed_run_goes_on_with_another_limit_and_the_same_bits(kept, tmp_path, monkeypatch) -> None:
    prepared, data = prepare()
    killed, resumed = copy.deepcopy(prepared), copy.deepcopy(prepared)
    memory = least(prepared, data, LEARNED, tmp_path, monkeypatch)
    reconstruct(prepared, data, LEARNED, progress=False)
    done: list[str] = []

    def dies_in_the_second_unit(error, *arguments):
        done.append(error.segment.name)
        if len(done) == 2:
            raise KeyboardInterrupt
        return round_unit(error, *arguments)

    how = {"checkpoint_dir": tmp_path / "blocks", "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(engine, "round_unit", dies_in_the_second_unit)
        with pytest.raises(KeyboardInterrupt):
            reconstruct(killed, data, LEARNED, memory=memory, **how)
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["block-000.safetensors"]
    report = reconstruct(resumed, data, LEARNED, memory=2 * memory, **how)
    assert [row.block for row in report.rows] == ["blocks.0", "blocks.1", "blocks.2"]
    assert all(torch.equal(x, y) for x, y in zip(state(resumed), state(prepared), strict=True))


def test_too_little_says_what_is_needed(tmp_path, monkeypatch) -> None:
    prepared, data = prepare(layers=1)
    with pytest.raises(
        ValueError, match=r"0\.00 GB of memory are too little: this process takes .* GB already, and roun"
    ):
        reconstruct(prepared, data, LEARNED, checkpoint_dir=tmp_path, memory=1000, progress=False)
    monkeypatch.setattr(engine, "anonymous_bytes", lambda: 3 * 10**9)
    message = r"3\.00 GB already.* for a step of 3 rows; allow 3\.0\d GB, or choose a smaller batch_size, scope='layer'"
    with pytest.raises(ValueError, match=message):
        reconstruct(prepared, data, LEARNED, checkpoint_dir=tmp_path, memory=10**9, progress=False)
    reconstruct(prepared, data, LEARNED, checkpoint_dir=tmp_path, memory=31 * 10**8, progress=False)
    with pytest.raises(ValueError, match=r"memory=5 .* give checkpoint_dir, a folder on a disk"):
        reconstruct(prepared, data, LEARNED, memory=5, progress=False)


def test_the_next_units_weights_are_read_while_one_is_at_work(monkeypatch) -> None:
    prepared, data = prepare()
    names = {x.data_ptr(): name for name, x in prepared.named_parameters()}
    asked: list[set[str]] = []
    monkeypatch.setattr(
        memory_budget, "will_need", lambda tensors: asked[-1].update(names[x.data_ptr()] for x in tensors)
    )
    prefetch = engine.prefetch_after
    monkeypatch.setattr(engine, "prefetch_after", lambda *a: (asked.append(set()), prefetch(*a)))
    reconstruct(prepared, data, AdaRoundConfig(iters=0), progress=False)
    blocks = [{name.split(".")[1] for name in each if name.startswith("blocks.")} for each in asked]
    assert blocks == [{"1"}, {"2"}, set()]
    assert "proj_out.weight" in asked[-1]  # what is behind the last unit


def child(folder: str) -> None:
    """Quantizes a model of 24 blocks that are in files, in a third of its size beside what modules take, and again without a
    limit; prints JSON."""
    from benchmarks.limited_memory import Peak

    def prepared(width: int, layers: int) -> tuple[torch.fx.GraphModule, list[dict[str, Tensor]], int]:
        files, data = MappedFiles(folder), [tiny_sample(width=width, seed=seed) for seed in range(2)]
        model = TinyDiT(width=width, layers=layers)
        for parameter in model.parameters():
            parameter.data = files.keep(parameter.data)
        quantizer = FP4DiTQuantizer().set_global(w4a6()).set_module_name("*attn*", None)  # fewer units
        graph = prepare_pt2e(capture(model, data[0]), quantizer)
        return graph, data, sum(parameter.nbytes for parameter in model.parameters())

    def quantize(graph: torch.fx.GraphModule, data: Any, memory: int | None) -> str:
        """Also says which bits came of it."""
        config = ReconstructionConfig(scope="layer", iters=1, batch_size=2)
        where = None if memory is None else f"{folder}/{memory}"
        reconstruct(graph, data, config, checkpoint_dir=where, memory=memory, progress=False)
        lowered = convert_and_lower(graph, files=MappedFiles(where) if where else None)
        digest = hashlib.sha256()
        for name, x in state_of(lowered).items():
            for part in flatten(name, x.detach()).values():
                for rows in part.reshape(-1).split(2**20):
                    digest.update(bytes_of(rows))
        return digest.hexdigest()

    quantize(*prepared(128, 1)[:2], 10**12)  # modules are imported
    graph, data, size = prepared(512, 24)
    gc.collect()
    return_freed(WORTH_IT)
    memory = anonymous_bytes() + size // 3
    with Peak() as peak:
        limited = quantize(graph, data, memory)
    same = limited == quantize(*prepared(512, 24)[:2], None)
    print(json.dumps({"size": size, "memory": memory, "peak": peak.bytes, "added": peak.added, "same bits": same}))


@pytest.mark.skipif(not anonymous_bytes(), reason="anonymous memory is read from /proc")
def test_a_model_three_times_as_large_as_its_memory(tmp_path: Path) -> None:
    code = "import sys; from tests.passes.reconstruction.test_memory_budget import child; child(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["size"] > 200e6
    assert found["peak"] < found["memory"] + SLACK, found
    assert found["same bits"]
